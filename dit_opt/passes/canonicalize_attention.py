"""Write decomposed attention as one call, so that the passes after it know one form only."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch.fx import Graph, Node

from dit_opt.decisions import Decision, RewriteReason
from dit_opt.facts.decomposed import match_decomposed
from dit_opt.facts.graph import Facts
from dit_opt.facts.nodes import example_of
from dit_opt.facts.ops import Trait, has, is_op
from dit_opt.facts.sites import Form, Site
from dit_opt.facts.writes import find_write
from dit_opt.options import Options
from dit_opt.passes.base import Match, Pass
from dit_opt.policy.choose_sites import find_choices
from dit_opt.program.edit import erase_unused
from dit_opt.program.emit import Emitter
from dit_opt.program.program import Program


class CanonicalizeAttention(Pass):
    """Decomposed attention becomes one call.

    Triggers on a site of form DECOMPOSED that sparse attention will replace::

        %scores = baddbmm(%mask, %q, %k.transpose(-1, -2), beta=1, alpha=scale)
        %weights = softmax(%scores, -1)
        %out = bmm(%weights, %v)

    in any of the spellings of `facts.decomposed`. It becomes::

        %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%mask, scale=scale)

    where `[B * H, N, D]` tensors get a head dimension of 1 before, and lose it after. Fused kernels
    write `[B, N, H, D]` memory and a product `[B, H, N, D]`, so `.contiguous()` follows, unless all
    that is done to the result is to put the heads after the tokens and to join them.

    Refuses sites that stay dense: the sums run in another order than before. Among them are those
    whose scores or weights are used elsewhere, or dropped at random, or cannot be read.
    """

    name = "canonicalize_attention"
    sparse_only = True

    def find(self, facts: Facts, options: Options) -> list[Match]:
        choices = {c.node: c for c in facts.get(find_choices, facts, options)}
        return [
            Match(_decide(site, choices[site.node].sparse is not None), site.node, site)
            for site in facts.sites
            if site.form is Form.DECOMPOSED
        ]

    def rewrite(self, program: Program, matches: Sequence[Match], options: Options) -> None:
        for match in matches:
            _rewrite(program.main.gm.graph, match.what)


def _decide(site: Site, is_chosen: bool) -> Decision:
    reason = RewriteReason.REWRITTEN if is_chosen else RewriteReason.STAYS_DENSE
    return Decision(site.module, site.source, reason)


def _rewrite(graph: Graph, site: Site) -> None:
    match = match_decomposed(site.node)
    assert match is not None
    example = example_of(site.node)
    flat = example.dim() == 3
    with graph.inserting_before(site.node):
        emit = Emitter(graph, site.node)
        qkv = (site.query, site.key, site.value)
        out = graph.call_function(
            F.scaled_dot_product_attention,
            tuple(emit.method("unsqueeze", n, 1) for n in qkv) if flat else qkv,
            {
                "attn_mask": _write_mask(emit, site, flat),
                "dropout_p": 0.0,
                "is_causal": False,
                "scale": site.scale,
            },
        )
        # the fused kernels' own value would have other strides
        out.meta = {**site.node.meta, "example_value": example.unsqueeze(1) if flat else example}
        if flat:
            out = emit.method("squeeze", out, 1)
        elif _shows_layout(site.node):
            out = emit.method("contiguous", out)
    site.node.replace_all_uses_with(out)
    interior = match.interior
    # transposes and casts that only the site needed, and baddbmm's empty input
    around = [n for node in interior for n in node.all_input_nodes if n.op.startswith("call")]
    graph.erase_node(site.node)
    erase_unused(graph, interior)
    erase_unused(graph, [n for n in around if n not in interior])


def _shows_layout(node: Node) -> bool:
    """Whether a user of attention's output may tell how it lies in memory.

    Where it is written in place, who shares its memory depends on that, too.
    """
    waiting = [(node, False)]
    while waiting:
        value, swapped = waiting.pop()
        for user in value.users:
            if is_op(user, "contiguous") or (swapped and is_op(user, "reshape", "flatten")):
                continue
            swaps = _swaps_heads(user)
            if not swaps and not has(user, Trait.KEEPS_LAYOUT):
                return True
            waiting.append((user, swapped != swaps))
    return find_write([node]) is not None


def _swaps_heads(node: Node) -> bool:
    """Whether all that a node does is to swap the heads and the tokens."""
    dims = node.args[1:]
    if is_op(node, "transpose"):
        return set(dims) in ({1, 2}, {-2, -3})
    return is_op(node, "permute") and dims in ((0, 2, 1, 3), ((0, 2, 1, 3),), ([0, 2, 1, 3],))


def _write_mask(emit: Emitter, site: Site, flat: bool) -> Node | None:
    mask = site.mask
    if mask is None:
        return None
    if flat and example_of(mask).dim() == 3:
        mask = emit.method("unsqueeze", mask, 1)
    dtype = example_of(site.query).dtype
    return mask if example_of(mask).dtype == dtype else emit.method("to", mask, dtype)
