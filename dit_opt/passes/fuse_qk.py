"""Write queries and keys by one kernel: normalised, rotated, in the layout that attention reads.

Inductor makes several kernels of it, because a head's channels are summed up and the pairs of a
rotation are not where they are stored.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from dit_opt.decisions import Decision, RewriteReason
from dit_opt.facts.graph import Facts
from dit_opt.facts.prologue import Prologue, ProloguePart, find_prologue
from dit_opt.options import OptionError, Options
from dit_opt.passes.base import Match, Pass
from dit_opt.policy.choose_sites import find_sparse_sites
from dit_opt.policy.sparse_site import SparseSite
from dit_opt.program.emit import Emitter
from dit_opt.program.program import Program


class FuseQK(Pass):
    """The norm and rotation of a query or key become one kernel.

    Triggers on a query or key of a site that is replaced, which `find_prologue` could read::

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

    Refuses what was not read, with the reason: other norms (LayerNorm), tables that differ between
    items or heads, rotations of what was put together before. What reads the old nodes besides
    attention keeps them.
    """

    name = "fuse_qk"
    keeps = frozenset({"tokens", "choices"})
    sparse_only = True

    def wanted(self, options: Options) -> bool:
        return options.fuse

    def find(self, facts: Facts, options: Options) -> list[Match]:
        found: dict[Node, Match] = {}
        for sparse in find_sparse_sites(facts, options):
            _refuse_cpu(sparse)
            site = sparse.site
            for name, node in zip(("query", "key"), sparse.qkv):
                if node not in found:
                    found[node] = _match(f"{name} of {site.module or site.index}", node, sparse)
        return list(found.values())

    def rewrite(self, program: Program, matches: Sequence[Match], options: Options) -> None:
        graph = program.main.gm.graph
        written: dict[Node, Node] = {}
        seen: list[Node] = []
        for match in matches:
            prologue: Prologue = match.what
            # A tensor that is written to in place is made before what is written.
            with graph.inserting_before(max([prologue.node, *prologue.interior]).next):
                written[prologue.node] = _write(graph, prologue)
            seen += [prologue.node, *prologue.interior]
        for sparse in find_sparse_sites(program.facts, options):
            for node in sparse.qkv[:2]:
                if node in written:
                    sparse.site.node.replace_input_with(node, written[node])
        _erase(graph, seen)

    def summarise(self, matches: Sequence[Match]) -> str:
        if not matches:
            return ""
        fused = sum(match.decision.accepted for match in matches)
        text = (
            f"{fused} of {len(matches)} queries and keys are normalised and rotated by one kernel "
            "each"
        )
        reasons: dict[str, list[str]] = {}
        for match in matches:
            if not match.decision.accepted:
                reasons.setdefault(match.decision.detail, []).append(match.what)
        rest = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "; ".join([text, *rest]) + "."


def _match(name: str, node: Node, sparse: SparseSite) -> Match:
    prologue = find_prologue(node)
    place = (sparse.site.module, sparse.site.source)
    if isinstance(prologue, Prologue):
        return Match(Decision(*place, RewriteReason.REWRITTEN), node, prologue)
    return Match(Decision(*place, RewriteReason.NOT_PROVED, prologue), node, name)


def _refuse_cpu(sparse: SparseSite) -> None:
    """Raises OptionError where the kernel would have to run elsewhere than on a GPU."""
    if sparse.example.device.type != "cuda":
        raise OptionError(
            f"fuse=True makes queries and keys by a Triton kernel, but the attention of "
            f"{sparse.site.module or 'a site'} is on {sparse.example.device}, where Inductor "
            "does it; leave `fuse` out."
        )


def _write(graph: Graph, prologue: Prologue) -> Node:
    """The calls for all parts of one query or key."""
    emit = Emitter(graph, prologue.node)
    written = [_write_part(emit, part) for part in prologue.parts]
    if len(written) > 1:
        return emit.call(torch.cat, written, 2)
    return written[0]


def _write_part(emit: Emitter, part: ProloguePart) -> Node:
    source, norm, rotation = part.source, part.norm, part.rotation
    if source.meta["example_value"].dim() == 3:
        source = emit.method("unflatten", source, 2, (part.heads, -1))
    elif part.token_dim == 2:
        source = emit.method("transpose", source, 1, 2)
    tables = [None, None]
    if rotation is not None:
        every = slice(None, None, None)
        where = (0, every, 0) if part.token_dim == 1 else (0, 0)
        tables = [emit.call(operator.getitem, t, where) for t in (rotation.cos, rotation.sin)]
    return emit.call(
        torch.ops.ditopt.norm_rope_v1.default,
        source,
        None if norm is None else norm.weight,
        -1.0 if norm is None else norm.eps,
        norm is not None and norm.across_heads,
        *tables,
        rotation is not None and rotation.halves,
        part.start,
        None,
    )


def _erase(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase those of `nodes` that only nodes of them read, in-place writes included."""
    known = set(nodes)
    for node in sorted(known, reverse=True):
        if node.target is operator.setitem:
            # what is written to is read by other writes only
            written = node.args[0]
            assert isinstance(written, Node)
            unread = all(u in known and u.target is operator.setitem for u in written.users)
        else:
            unread = not node.users
        if unread:
            graph.erase_node(node)
