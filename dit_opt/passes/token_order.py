"""Keep the video tokens in one order from where they are made to where they leave.

A gather at each attention call moves q, k, v and the output of every layer; one at each end of the
model moves the tokens twice in all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt.decisions import Decision, RewriteReason
from dit_opt.facts.graph import Facts
from dit_opt.facts.order import OrderRegion, TokenEdge, find_order_region
from dit_opt.facts.sizes import are_equal
from dit_opt.options import Options
from dit_opt.passes.base import Match, Pass
from dit_opt.policy.choose_sites import find_choices, mark_ordered
from dit_opt.program.emit import ORIGIN, Emitter
from dit_opt.program.program import PinnedTable, Program
from dit_opt.program.sizes import SizeWriter
from dit_opt.routers import find_router
from dit_opt.routers.block_router import make_region_order

# A dimension with more than the tokens, piece by piece: (start, stop) of what stays where it is,
# (start, None) of the tokens.
Size: TypeAlias = "int | Node"
Place: TypeAlias = "tuple[tuple[Size, Size | None], ...]"


class TokenOrder(Pass):
    """All tokens of the graph are put into the cube order once; see `order_tokens`.

    Triggers where a chosen site's router weighs blocks in one order for all heads and
    `find_order_region` proves that the graph may run in it. Before and after::

        %q, %k, %v = index_select(... of every site, tokens, %rows)

        %tokens = index_select(%tokens, tokens, %rows)  # once, and back where they leave

    Refuses graphs with a node that acts differently at different tokens, or that tells no grid;
    the decision names the node. Their tokens are gathered at each attention call.
    """

    name = "token_order"
    keeps = frozenset({"tokens", "choices"})
    sparse_only = True

    def wanted(self, options: Options) -> bool:
        routes = options.router != "dense" and options.density != 1
        return routes and find_router(options.router).cube_order

    def find(self, facts: Facts, options: Options) -> list[Match]:
        choices = facts.get(find_choices, facts, options)
        sites = [(c.sparse.site, c.layout) for c in choices if c.sparse and c.layout]
        if not sites:
            return []
        found = find_order_region(facts.graph, facts.tokens.labels, sites)
        if isinstance(found, OrderRegion):
            device = sites[0][0].node.meta["example_value"].device
            return [Match(Decision("", "", RewriteReason.REWRITTEN), None, (found, device))]
        reason = RewriteReason.NOT_PROVED
        return [Match(Decision(found.module, found.source, reason, str(found)))]

    def declare(self, program: Program, matches: Sequence[Match], options: Options) -> None:
        region, _ = matches[0].what
        program.plan.pins.append(
            PinnedTable(None, (*region.grid, region.length), make_region_order)
        )

    def rewrite(self, program: Program, matches: Sequence[Match], options: Options) -> None:
        region, device = matches[0].what
        moved = order_by_cubes(program.main.gm, region, device)
        facts = program.facts
        choices = facts.get(find_choices, facts, options)
        ordered = mark_ordered(choices, region.sites, moved)
        facts.put(ordered, find_choices, facts, options)

    def summarise(self, matches: Sequence[Match]) -> str:
        if not matches:
            return ""
        decision, what = matches[0].decision, matches[0].what
        if not decision.accepted:
            return f"Tokens are gathered at each attention call. {decision.detail}"
        region, _ = what
        count = len(region.entries) + len(region.tables) + len(region.exits)
        return f"Tokens are ordered once for the whole graph, by {count} gathers."


def order_by_cubes(gm: GraphModule, region: OrderRegion, device: torch.device) -> dict[Node, Node]:
    """`order_tokens` in the cube order of the region's grid, made on `device`.

    Returns what stands for each value in the order.
    """
    sizes = SizeWriter(gm.graph)
    where = [sizes.write(size) for size in region.grid]
    length = sizes.write(region.length)
    like = next(
        n
        for n in gm.graph.find_nodes(op="placeholder")
        if isinstance(value := n.meta.get("example_value"), torch.Tensor) and value.device == device
    )
    with gm.graph.inserting_before(sizes.next_node()):
        emit = Emitter(gm.graph, like)
        made = emit.call(torch.ops.ditopt.cube_order_v1.default, like, *where, 0, length)
        order, inverse = emit.unpack(made, 2)
    gathers = order_tokens(gm, region, order, inverse)
    return {e.node: node for e, node in gathers.items() if e not in region.exits}


def order_tokens(
    gm: GraphModule, region: OrderRegion, order: Node, inverse: Node
) -> dict[TokenEdge, Node]:
    """Rewrite `gm` so that its region runs on permuted tokens; returns the gather at each edge.

    Triggers on a region that `find_order_region` proved. With `N` video tokens behind `S` of text::

        %tokens = flatten(%patches, 2)                  # [B, C, N]
        %mask = lt(%arange, %lengths)                   # [B, S + N], %arange is a table
        ...
        %video = unflatten(%projected, 1, (T, H, W))    # %projected: [B, N, C]

    becomes::

        %tokens = flatten(%patches, 2)
        %tokens_ordered = index_select(%tokens, 2, %order)
        %rows = cat([arange(S), %order + S])
        %arange_ordered = index_select(%arange, 0, %rows)
        %mask = lt(%arange_ordered, %lengths)
        ...
        %projected_restored = index_select(%projected, 1, %inverse)
        %video = unflatten(%projected_restored, 1, (T, H, W))

    Nodes that read a value outside of the region keep the one that they have.

    Args:
        gm: a copy of Dynamo's graph (the region's nodes are of this copy); it is edited.
        region: where the order begins and ends.
        order: int64 `[N]`, a node: row `i` of the ordered tokens is row `order[i]` of the model's.
        inverse: int64 `[N]`, a node: the inverse permutation.

    Raises ValueError where `order` or `inverse` is made too late, that is after a node that has to
    read tokens in the order. Refuses nothing else: what cannot be ordered has no region.
    """
    graph = gm.graph
    sizes = SizeWriter(graph)
    begins, ends = [*region.entries, *region.tables], region.exits
    # Sizes stand right after the inputs; write them all before places are looked for.
    places = {edge: _write_place(sizes, edge, region) for edge in (*begins, *ends)}
    rows = _Rows(graph)
    gathers: dict[TokenEdge, Node] = {}
    for edge in sorted(begins, key=lambda e: e.node):
        users = sorted(edge.users)
        before = _first_place(graph, edge, order, places[edge])
        if users[0] < before:
            raise ValueError(
                f"The order {order.name} of the tokens is made after {users[0].name}, which has to "
                f"read {edge.node.name} in this order. Make it right after the graph's inputs."
            )
        index = rows.find(order, places[edge], edge, before)
        gathers[edge] = ordered = _gather(graph, edge, index, before, "ordered")
        for user in users:
            user.replace_input_with(edge.node, ordered)
    for edge in sorted(ends, key=lambda e: min(e.users)):
        before = min(edge.users)
        if before < inverse:
            raise ValueError(
                f"The inverse order {inverse.name} of the tokens is made after {before.name}, "
                f"which has to read {edge.node.name} in the model's own order. Make it right after "
                "the graph's inputs."
            )
        index = rows.find(inverse, places[edge], edge, before)
        gathers[edge] = restored = _gather(graph, edge, index, before, "restored")
        for user in edge.users:
            user.replace_input_with(edge.node, restored)
    return gathers


def _write_place(sizes: SizeWriter, edge: TokenEdge, region: OrderRegion) -> Place | None:
    """Where the tokens are in the edge's dimension; None where they are all of it."""
    if are_equal(edge.total, region.length):
        return None
    pieces: list[tuple[Size, Size | None]] = []
    at = sympy.S.Zero
    for start in edge.starts:
        if not are_equal(at, start):
            pieces.append((sizes.write(at), sizes.write(start)))
        pieces.append((sizes.write(start), None))
        at = sympy.expand(start + region.length)
    if not are_equal(at, edge.total):
        pieces.append((sizes.write(at), sizes.write(sympy.expand(edge.total))))
    return tuple(pieces)


def _first_place(graph: Graph, edge: TokenEdge, order: Node, place: Place | None) -> Node:
    """The first node before which the value, the order and all sizes are there."""
    needed = [edge.node, order, *graph.find_nodes(op="placeholder")]
    if place is not None:
        needed += [size for piece in place for size in piece if isinstance(size, Node)]
    return max(needed).next


def _gather(graph: Graph, edge: TokenEdge, rows: Node, before: Node, name: str) -> Node:
    value = edge.node.meta["example_value"]
    with graph.inserting_before(before):
        node = graph.create_node(
            "call_function",
            torch.index_select,
            (edge.node, edge.dim, rows),
            name=f"{edge.node.name}_{name}",
        )
    node.meta = {key: edge.node.meta[key] for key in ORIGIN if key in edge.node.meta}
    # A gather's result is contiguous whatever it read.
    node.meta["example_value"] = value.new_empty(value.shape)
    return node


class _Rows:
    """Permutations of whole dimensions, text in place; each is written once, at its first use."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._written: dict[tuple[Node, Place], Node] = {}

    def find(self, order: Node, place: Place | None, edge: TokenEdge, before: Node) -> Node:
        if place is None:
            return order
        if (order, place) not in self._written:
            device = edge.node.meta["example_value"].device
            with self._graph.inserting_before(before):
                self._written[order, place] = self._write(order, place, device)
        return self._written[order, place]

    def _write(self, order: Node, place: Place, device: torch.device) -> Node:
        emit = Emitter(self._graph, order)
        pieces = []
        for start, stop in place:
            if stop is not None:
                pieces.append(emit.call(torch.arange, start, stop, device=device))
            elif start == 0:
                pieces.append(order)
            else:
                pieces.append(emit.call(operator.add, order, start))
        return emit.call(torch.cat, pieces)
