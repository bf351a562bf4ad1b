"""The part of a graph in which the video tokens may be kept in another order.

Sparse patterns want neighbours in (T, H, W) to be neighbours in memory. A permutation of the tokens
that is the same for all heads can be applied once, to the tokens and to every table over them, and
undone once, if every node between treats all tokens alike. The proof is layout propagation: see
`order_map`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Graph, Node

from dit_opt.facts.axes import resolve, segments, size
from dit_opt.facts.labels import Labels, NoRule
from dit_opt.facts.layouts import Layout, SegmentKind
from dit_opt.facts.nodes import input_name
from dit_opt.facts.ops import is_op, op_name
from dit_opt.facts.order_aliases import find_stale_write
from dit_opt.facts.order_map import OrderMap, OrderReason
from dit_opt.facts.sites import Site, module_of, source_of
from dit_opt.facts.token_axes import TokenAxes


@dataclass(frozen=True)
class TokenEdge:
    """A value at which the order begins or ends.

    Attributes:
        node: the value, one tensor.
        dim: its dimension with the tokens.
        starts: where the video tokens begin in that dimension, once for each time it holds them.
        total: size of that dimension, text included.
        users: the nodes that read it permuted, where the order begins; those that read it in the
            model's own order, where it ends.
    """

    node: Node
    dim: int
    starts: tuple[sympy.Expr, ...]
    total: sympy.Expr
    users: tuple[Node, ...]


@dataclass(frozen=True)
class OrderRegion:
    """The part of a graph in which the video tokens may be kept in any one order.

    Attributes:
        grid: (T, H, W) of the video tokens, row-major in the model's own order.
        length: their number.
        entries: the values made from the latents that are to be permuted.
        tables: likewise, of values made without the latents: position tables, masks, ids.
        exits: the values on which the permutation is to be undone.
        sites: the attention calls whose queries are in the order, in graph order.
    """

    grid: tuple[sympy.Expr, sympy.Expr, sympy.Expr]
    length: sympy.Expr
    entries: tuple[TokenEdge, ...]
    tables: tuple[TokenEdge, ...]
    exits: tuple[TokenEdge, ...]
    sites: tuple[Node, ...]


@dataclass(frozen=True)
class OrderRefusal:
    """Why there is no such region.

    Attributes:
        reason: what stopped the proof.
        node: name of the node that did; "" where no single one did.
        op: its op; `module` and `source` say where the model calls it.
        detail: what only this graph can tell.
    """

    reason: OrderReason
    node: str = ""
    op: str = ""
    module: str = ""
    source: str = ""
    detail: str = ""

    def __str__(self) -> str:
        place = " at ".join(filter(None, (self.module, self.source)))
        where = f"`{self.op}` ({self.node})" + (f" in {place}" if place else "") if self.op else ""
        return " ".join(filter(None, (where and f"{where}:", self.reason.value, self.detail)))


def find_order_region(
    graph: Graph, labels: Labels, sites: Sequence[tuple[Site, Layout]]
) -> OrderRegion | OrderRefusal:
    """Where the tokens of the given sites enter and leave an order of their own.

    Args:
        graph: a pre-grad graph as Dynamo makes it; it is read only and gets no guard.
        labels: of the same graph, as `find_tokens(...).labels`.
        sites: the attention calls that want the order, with their layouts; those whose layout has
            no grid are left out, and what the others range over must be the same tokens.
    """
    chosen = _choose_tokens(labels, sites)
    if isinstance(chosen, OrderRefusal):
        return chosen
    tokens, layout, source = chosen
    orders = OrderMap(graph, labels, tokens)
    crossing = orders.find_crossing()
    if crossing is not None:
        detail = labels.unknown.get(crossing, "")
        return _refuse(orders.pinned[crossing], crossing, detail and f"In detail: {detail}.")
    stale = find_stale_write(orders)
    if stale is not None:
        return _refuse(OrderReason.IN_PLACE, stale)
    edges: dict[str, list[TokenEdge]] = {"entries": [], "exits": []}
    for side, values in (("entries", _entries(orders)), ("exits", _exits(orders))):
        for node, users in values:
            edge = _edge(orders, node, users)
            if isinstance(edge, OrderRefusal):
                return edge
            edges[side].append(edge)
    data = _made_from(orders, source)
    assert layout.grid is not None
    return OrderRegion(
        layout.grid.sizes,
        tokens.length,
        tuple(e for e in edges["entries"] if e.node in data),
        tuple(e for e in edges["entries"] if e.node not in data),
        tuple(edges["exits"]),
        tuple(
            s.node
            for s, _ in sites
            if s.query is not None and orders.holds(s.query) and s.node not in orders.pinned
        ),
    )


def _choose_tokens(
    labels: Labels, sites: Sequence[tuple[Site, Layout]]
) -> tuple[TokenAxes, Layout, str | None] | OrderRefusal:
    """(the axes of the latent tokens, a layout with them, the input they stem from)."""
    found: list[tuple[TokenAxes, Site, Layout, str | None]] = []
    for site, layout in sites:
        places = [i for i, s in enumerate(layout.query) if s.kind is SegmentKind.LATENTS]
        if layout.grid is None or len(places) != 1 or site.query is None:
            continue
        try:
            parts = segments(labels[site.query][-2])
        except NoRule as error:
            return _refuse(OrderReason.NO_TOKENS, site.node, f"In detail: {error}.")
        if len(parts) != len(layout.query):
            return _refuse(OrderReason.STACKED, site.node)
        tokens = TokenAxes(parts[places[0]])
        if found and tokens != found[0][0]:
            names = f"{found[0][1].node.name} and {site.node.name}"
            return OrderRefusal(OrderReason.SEVERAL_TOKENS, detail=f"They differ in {names}.")
        found.append((tokens, site, layout, layout.query[places[0]].source))
    if found:
        tokens, _, layout, source = found[0]
        return tokens, layout, source
    without = [(s, x) for s, x in sites if any(p.kind is SegmentKind.LATENTS for p in x.query)]
    if without:
        return _refuse(OrderReason.NO_GRID, without[0][0].node, without[0][1].reason)
    known = [(s, x) for s, x in sites if x.reason]
    if known:
        return _refuse(OrderReason.NO_TOKENS, known[0][0].node, known[0][1].reason)
    return OrderRefusal(OrderReason.NO_TOKENS)


def _entries(orders: OrderMap) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """The values that pinned nodes make, each with the nodes that read it permuted."""
    for node in orders.nodes:
        if orders.is_entry(node) and orders.labels.is_tensor(node):
            users = tuple(
                u for u in node.users if u not in orders.pinned and _reads_values(orders, u)
            )
            if users:
                yield node, users


def _exits(orders: OrderMap) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """The permuted values that pinned nodes read, each with these nodes."""
    users: dict[Node, list[Node]] = {}
    for user in orders.nodes:
        for node in orders.undone_inputs(user):
            users.setdefault(node, []).append(user)
    for node, readers in users.items():
        yield node, tuple(readers)


def _reads_values(orders: OrderMap, node: Node) -> bool:
    """Whether a node reads more than a shape."""
    return orders.labels.label_of(node) is not None or is_op(node, "setitem")


def _edge(orders: OrderMap, node: Node, users: tuple[Node, ...]) -> TokenEdge | OrderRefusal:
    if not orders.labels.is_tensor(node):
        return _refuse(orders.pinned[users[0]], users[0], "It reads a tuple of tensors as one.")
    dims = [(d, dim) for d, dim in enumerate(orders.labels[node]) if orders.tokens.count(dim)]
    if len(dims) > 1:
        return _refuse(OrderReason.PAIRWISE, node)
    ((d, dim),) = dims
    starts = orders.tokens.starts(dim)
    if starts is None:
        return _refuse(OrderReason.FOLDED, node)
    return TokenEdge(node, d, starts, size(resolve(dim)), users)


def _made_from(orders: OrderMap, source: str | None) -> set[Node]:
    """The tensors that are computed from an input; its sizes do not count."""
    made: set[Node] = set()
    for node in orders.nodes:
        if node.op == "placeholder":
            made.update([node] if input_name(node) == source else [])
        elif orders.labels.label_of(node) is not None:
            made.update([node] if any(a in made for a in node.all_input_nodes) else [])
    return made


def _refuse(reason: OrderReason, node: Node, detail: str = "") -> OrderRefusal:
    return OrderRefusal(reason, node.name, op_name(node), module_of(node), source_of(node), detail)
