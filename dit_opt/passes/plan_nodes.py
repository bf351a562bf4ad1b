"""The nodes that route one attention site: tokens into an order, a plan, tokens back.

Each router writes its own operators; what comes after them only sees block lists.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt.facts.sites import Site
from dit_opt.passes.graph_edit import append_placeholder
from dit_opt.passes.sparse_site import BLOCK_K, BLOCK_Q, SparseForm, SparseSite
from dit_opt.passes.symbolic_sizes import SizeWriter

# adaspa: one row of so many stands for its neighbours; a search of all costs 0.7 of a dense call
ROW_STEP = 16
# subblock: tokens in a cell
CELL = 16
# The least mean square of what rows drop: peaked rows leave room for flat ones.
SPREAD = "even"


@dataclass(frozen=True)
class Routed:
    """What `write_plan` wrote for one site.

    Attributes:
        q, k, v, bias: the inputs of attention, in the plan's order.
        counts, indices: the lists.
        plan: what a later call needs to do without a search.
        statistics: recall and density, each `[B or 1, H]`; none without a search.
        expected: the mass that the guard wants kept, `[B, H]`; None catches no head.
        inverse: the permutation that moves the output back, or None. per_head: it has one for
            each head, and not one for all.
    """

    q: Node
    k: Node
    v: Node
    bias: Node | None
    counts: Node
    indices: Node
    plan: tuple[Node, ...]
    statistics: tuple[Node, ...]
    expected: Node | None
    inverse: Node | None
    per_head: bool = False

    def restore(self, graph: Graph, out: Node) -> Node:
        """The output of attention in the model's own order."""
        if self.inverse is None:
            return out
        if self.per_head:
            operator_ = torch.ops.ditopt.scatter_tokens_v1.default
            return graph.call_function(operator_, (out, self.inverse))
        return _select(graph, out, self.inverse)


def takes_cube_order(router: str) -> bool:
    """Whether a router weighs blocks of any tokens, which cubes make compact."""
    return router not in ("full", "dense", "rainfusion", "frame_tile")


def count_plan_tensors(router: str) -> int:
    """How many tensors a router keeps from one search to the next."""
    return {"full": 0, "frame_tile": 0, "rainfusion": 1}.get(router, 2)


def write_plan(
    gm: GraphModule,
    sparse: SparseSite,
    index: int,
    qkv: Sequence[Node],
    bias: Node | None,
    sizes: SizeWriter,
    form: SparseForm,
) -> Routed:
    """Write the router's nodes at the graph's insertion point."""
    write = {
        "full": _write_full,
        "rainfusion": _write_rainfusion,
        "frame_tile": _write_frame_tile,
    }.get(sparse.router, _write_search)
    return write(gm, sparse, index, qkv, bias, sizes, form)


def _write_full(gm, sparse, index, qkv, bias, sizes, form) -> Routed:
    graph, (q, k, v) = gm.graph, qkv
    length = _length(graph, k)
    plan = graph.call_function(
        torch.ops.ditopt.dense_plan_v1.default, (q, length, BLOCK_Q, BLOCK_K)
    )
    return Routed(q, k, v, bias, *unpack(graph, plan, 2), (), (), None, None)


def _write_rainfusion(gm, sparse, index, qkv, bias, sizes, form) -> Routed:
    graph, ops, (q, k, v) = gm.graph, torch.ops.ditopt, qkv
    call = graph.call_function
    where = [sizes.write(s) for s in (*sparse.grid, sparse.start)]
    statistics: tuple[Node, ...] = ()
    if form.reuse:
        choice = _add_input(gm, f"ditopt_choice_{index}", sparse.site)
    else:
        goal = (sparse.scale, sparse.target, sparse.by_density)
        boost = _write_boost(gm, sparse, index, form)
        found = call(
            ops.rainfusion_recognize_v1.default,
            (q, k, bias, *goal, *where, BLOCK_Q, BLOCK_K, boost),
        )
        choice, *rest = unpack(graph, found, 3)
        statistics = tuple(rest)
    lists = call(
        ops.rainfusion_plan_v1.default, (choice, _length(graph, q), *where, BLOCK_Q, BLOCK_K)
    )
    counts, indices, rows, inverse = unpack(graph, lists, 4)
    q, k, v = (call(ops.gather_tokens_v1.default, (x, rows)) for x in (q, k, v))
    if bias is not None:
        bias = call(ops.gather_bias_v1.default, (bias, rows))
    expected = _write_expected(gm, sparse, index, form, statistics)
    return Routed(
        q, k, v, bias, counts, indices, (choice,), statistics, expected, inverse, per_head=True
    )


def _write_frame_tile(gm, sparse, index, qkv, bias, sizes, form) -> Routed:
    graph, (q, k, v) = gm.graph, qkv
    where = [sizes.write(s) for s in (*sparse.grid, sparse.start)]
    plan = graph.call_function(
        torch.ops.ditopt.frame_tile_plan_v1.default, (q, sparse.target, *where, BLOCK_Q, BLOCK_K)
    )
    counts, indices, recall, density = unpack(graph, plan, 4)
    statistics = () if form.reuse else (recall, density)
    if not form.reuse:
        # these tiles are no larger for a head that needs more; every search takes a boost
        _write_boost(gm, sparse, index, form)
    expected = _write_expected(gm, sparse, index, form, statistics)
    return Routed(q, k, v, bias, counts, indices, (), statistics, expected, None)


def _write_search(gm, sparse, index, qkv, bias, sizes, form) -> Routed:
    """The routers that weigh blocks, in the cube order where there is a grid.

    Tokens that are in the order already stay where they are.
    """
    graph, (q, k, v) = gm.graph, qkv
    start, inverse = sizes.write(sparse.start), None
    if sparse.grid is not None and not sparse.ordered:
        where = [sizes.write(s) for s in (*sparse.grid, sparse.start)]
        order = graph.call_function(
            torch.ops.ditopt.cube_order_v1.default, (q, *where, _length(graph, q))
        )
        rows, inverse = unpack(graph, order, 2)
        q, k, v = (_select(graph, x, rows) for x in (q, k, v))
        if bias is not None:
            bias = graph.call_function(torch.index_select, (bias, 2, rows))
    if form.reuse:
        counts = _add_input(gm, f"ditopt_counts_{index}", sparse.site, [BLOCK_Q])
        indices = _add_input(gm, f"ditopt_indices_{index}", sparse.site, [BLOCK_Q, BLOCK_K])
        expected = _write_expected(gm, sparse, index, form, ())
        return Routed(q, k, v, bias, counts, indices, (counts, indices), (), expected, inverse)
    place = (start, sizes.write(sparse.video), BLOCK_Q, BLOCK_K)
    boost = _write_boost(gm, sparse, index, form)
    search, arguments = _name_search(sparse, q, k, bias, place)
    found = graph.call_function(search, arguments, {} if boost is None else {"boost": boost})
    counts, indices, recall, density = unpack(graph, found, 4)
    statistics = (recall, density)
    expected = _write_expected(gm, sparse, index, form, statistics)
    return Routed(q, k, v, bias, counts, indices, (counts, indices), statistics, expected, inverse)


def _name_search(sparse: SparseSite, q, k, bias, place) -> tuple:
    """The operator of a searching router and its arguments."""
    ops, goal = torch.ops.ditopt, (sparse.scale, sparse.target)
    if sparse.router == "sol":
        by = "density" if sparse.by_density else "quality"
        return ops.sol_plan_v1.default, (q, k, bias, *goal, by, *place, SPREAD)
    goal = (*goal, sparse.by_density, *place)
    if sparse.router == "subblock":
        return ops.subblock_plan_v1.default, (q, k, bias, *goal, CELL, SPREAD)
    step = {"adaspa": ROW_STEP, "oracle": 1}[sparse.router]
    return ops.adaspa_plan_v1.default, (q, k, bias, None, *goal, step, SPREAD)


def unpack(graph: Graph, node: Node, count: int) -> list[Node]:
    """The first `count` results of a node that returns a tuple."""
    return [graph.call_function(operator.getitem, (node, i)) for i in range(count)]


def _length(graph: Graph, x: Node) -> Node:
    return graph.call_function(torch.ops.aten.sym_size.int, (x, -2))


def _select(graph: Graph, x: Node, rows: Node) -> Node:
    """Tokens of `[B, H, N, D]` in one order for all heads, in `[B, N, H, D]` memory."""
    turned = graph.call_method("transpose", (x, 1, 2))
    moved = graph.call_function(torch.index_select, (turned, 1, rows))
    return graph.call_method("transpose", (moved, 1, 2))


def _write_boost(gm: GraphModule, sparse: SparseSite, index: int, form: SparseForm) -> Node | None:
    if not form.guard:
        return None
    return _add_input(gm, f"ditopt_boost_{index}", sparse.site, dtype=torch.float32)


def _write_expected(
    gm: GraphModule, sparse: SparseSite, index: int, form: SparseForm, statistics: tuple[Node, ...]
) -> Node | None:
    """What a plan should keep: what it kept when it was made, or the quality that was asked for."""
    if not form.guard:
        return None
    if form.reuse:
        return _add_input(gm, f"ditopt_kept_{index}", sparse.site, dtype=torch.float32)
    if sparse.by_density:
        return None
    return gm.graph.call_function(torch.full_like, (statistics[0], sparse.target))


def _add_input(
    gm: GraphModule,
    name: str,
    site: Site,
    blocks: Sequence[int] = (),
    dtype: torch.dtype = torch.int32,
) -> Node:
    """A placeholder for state: `[B, H, N / block, ...]`, sized as the query."""
    example = site.query.meta["example_value"]
    batch, heads = (example.shape[0], 1) if example.dim() == 3 else example.shape[:2]
    axes = [(example.shape[-2] + block - 1) // block for block in blocks]
    return append_placeholder(gm, name, example.new_empty((batch, heads, *axes), dtype=dtype))
