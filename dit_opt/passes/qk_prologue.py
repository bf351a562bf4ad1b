"""Write queries and keys by one kernel: normalised, rotated, in the layout that attention reads.

Inductor makes several kernels of it, because a head's channels are summed up and the pairs of a
rotation are not where they are stored.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt.facts.nodes import sizes_of
from dit_opt.facts.prologue import Prologue, ProloguePart, find_prologue
from dit_opt.facts.sites import Site
from dit_opt.passes.graph_edit import erase_unused

__all__ = ["describe_prologues", "find_prologues", "fold_orders", "fuse_prologues"]


def find_prologues(sites: Sequence[Site]) -> dict[Node, Prologue | str]:
    """What each query and key of the sites comes from, or why that is not known."""
    nodes = [n for site in sites for n in (site.query, site.key) if n is not None]
    return {node: find_prologue(node) for node in dict.fromkeys(nodes)}


def describe_prologues(sites: Sequence[Site]) -> str:
    """One sentence for reports: how many are fused, and why the others are not."""
    found = find_prologues(sites)
    fused = sum(isinstance(prologue, Prologue) for prologue in found.values())
    text = f"{fused} of {len(found)} queries and keys are normalised and rotated by one kernel each"
    reasons: dict[str, list[str]] = {}
    for site in sites:
        for name, node in (("query", site.query), ("key", site.key)):
            reason = found.get(node) if node is not None else None
            if isinstance(reason, str):
                reasons.setdefault(reason, []).append(f"{name} of {site.module or site.index}")
    rest = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "; ".join([text, *rest]) + "."


def fuse_prologues(gm: GraphModule, sites: Sequence[Site]) -> list[Node]:
    """Rewrite the queries and keys of the sites in `gm`; returns what `fold_orders` may look at.

    Triggers on a query or key that `find_prologue` could read::

        %normed = rms_norm(%projected, (D,), %weight, eps)      # or written out
        %split = unbind(unflatten(%normed, -1, (-1, 2)), -1)    # or reshape, by pairs or halves
        %query = ... %split[0] * %cos - %split[1] * %sin ...    # into one tensor
        %q = permute(%query, 0, 2, 1, 3)
        %out = scaled_dot_product_attention(%q, %k, %v)

    becomes::

        %table = getitem(%cos, (0, :, 0)), ...
        %q = norm_rope_v1(%projected, %weight, eps, False, %table, ..., None)
        %out = scaled_dot_product_attention(%q, %k, %v)

    Tokens that come from several projections get one call each, and a concatenation. Norms and
    rotations are computed in float32 with one rounding at the end; models round after each.

    Refuses queries and keys that were not read, with the reason in `describe_prologues`: other
    norms (LayerNorm), tables that differ between items or heads, rotations of what was put
    together before. What reads the old nodes besides attention keeps them.
    """
    done: dict[Node, Node] = {}
    seen: list[Node] = []
    for site in sites:
        for node in (site.query, site.key):
            prologue = find_prologue(node) if node is not None and node not in done else None
            if isinstance(prologue, Prologue):
                # A tensor that is written to in place is made before what is written.
                with gm.graph.inserting_before(max([prologue.node, *prologue.interior]).next):
                    done[prologue.node] = _write(gm.graph, prologue)
                seen += [prologue.node, *prologue.interior]
    for site in sites:
        for node in (site.query, site.key):
            if node in done:
                site.node.replace_input_with(node, done[node])
    _erase(gm.graph, seen)
    gm.graph.lint()
    gm.recompile()
    return list(dict.fromkeys(done[n] for site in sites for n in _own_order(site) if n in done))


def fold_orders(gm: GraphModule, written: Sequence[Node]) -> int:
    """Have the kernel write each head's own order; returns how many gathers that saved.

    Triggers on a gather of one of `written`, which `fuse_prologues` returned, that only it reads::

        %q = norm_rope_v1(%x, ..., None)
        %q1 = gather_tokens_v1(%q, %rows)

    becomes::

        %q1 = norm_rope_v1(%x, ..., %rows)

    Refuses what a search reads too, which comes before its order is known; what was put together
    from several calls; keys of fewer heads than their queries, which have an order for each query.
    """
    graph, ops = gm.graph, torch.ops.ditopt
    folded = 0
    for made in written:
        gather = next(iter(made.users), None)
        if gather is None or len(made.users) > 1 or made.target is torch.cat:
            continue
        if gather.target is not ops.gather_tokens_v1.default:
            continue
        rows = gather.args[1]
        with graph.inserting_before(gather):
            node = graph.call_function(made.target, (*made.args[:-1], rows))
        node.meta = {**gather.meta}
        gather.replace_all_uses_with(node)
        erase_unused(graph, [made, gather])
        folded += 1
    graph.lint()
    gm.recompile()
    return folded


def _own_order(site: Site) -> list[Node]:
    """The query and key, but for a key of fewer heads: each of its queries has an order."""
    nodes = [n for n in (site.query, site.key) if n is not None]
    heads = [sizes_of(n.meta["example_value"])[1] for n in nodes]
    return nodes if len(set(heads)) == 1 else nodes[:1]


def _write(graph: Graph, prologue: Prologue) -> Node:
    """The calls for all parts of one query or key."""
    written = [_write_part(graph, part) for part in prologue.parts]
    example = prologue.node.meta["example_value"]
    node = written[0] if len(written) == 1 else graph.call_function(torch.cat, (written, 2))
    batch, heads, tokens, dim = example.shape
    node.meta = {k: v for k, v in prologue.node.meta.items() if k != "example_value"}
    if len(written) == 1:
        # in memory as projections lie, tokens before heads
        node.meta["example_value"] = example.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    else:
        node.meta["example_value"] = example.new_empty(example.shape)
    return node


def _write_part(graph: Graph, part: ProloguePart) -> Node:
    call, source = graph.call_function, part.source
    norm, rotation = part.norm, part.rotation
    if source.meta["example_value"].dim() == 3:
        source = graph.call_method("unflatten", (source, 2, (part.heads, -1)))
    elif part.token_dim == 2:
        source = graph.call_method("transpose", (source, 1, 2))
    tables = [None, None]
    if rotation is not None:
        every = slice(None, None, None)
        where = (0, every, 0) if part.token_dim == 1 else (0, 0)
        tables = [call(operator.getitem, (t, where)) for t in (rotation.cos, rotation.sin)]
    return call(
        torch.ops.ditopt.norm_rope_v1.default,
        (
            source,
            None if norm is None else norm.weight,
            -1.0 if norm is None else norm.eps,
            norm is not None and norm.across_heads,
            *tables,
            rotation is not None and rotation.halves,
            part.start,
            None,
        ),
    )


def _erase(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase those of `nodes` that only nodes of them read, in-place writes included."""
    known = set(nodes)
    for node in sorted(known, reverse=True):
        if node.target is operator.setitem:
            # what is written to is read by other writes only
            users = node.args[0].users  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            unread = all(u in known and u.target is operator.setitem for u in users)
        else:
            unread = not node.users
        if unread:
            graph.erase_node(node)
