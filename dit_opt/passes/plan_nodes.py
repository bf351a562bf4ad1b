"""The nodes that route one attention site: tokens into an order, a plan, tokens back.

Each router writes its own operators; what comes after them only sees block lists.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt.kernels.plan.packing import WORD
from dit_opt.passes.graph_edit import append_placeholder
from dit_opt.passes.sparse_site import BLOCK_K, BLOCK_Q, SparseForm, SparseSite
from dit_opt.passes.symbolic_sizes import SizeWriter

# `adaspa`: one row of so many stands for its neighbours. A search of all costs 0.7 of a dense call.
ROW_STEP = 16
# `headwise`: one row of so many, drawn out of small boxes of the video.
HEADWISE_CELL = 16
# `subblock`: tokens in a cell.
CELL = 16


@dataclass(frozen=True)
class Place:
    """Where a plan is written, and for what.

    Attributes:
        gm: the graph, with its insertion point at the site. index: the number of the site.
        sparse, form: what to write.
        qkv, bias: the inputs of attention, `[B, H, N, D]` and `[B, 1, Nk]`.
        sizes: writes symbolic sizes into the graph.
    """

    gm: GraphModule
    index: int
    sparse: SparseSite
    form: SparseForm
    qkv: Sequence[Node]
    bias: Node | None
    sizes: SizeWriter

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    def write_grid(self) -> list[Any]:
        """T, H, W and the first latent token; a row of tokens where there is no grid."""
        grid = self.sparse.grid or (1, 1, self.sparse.video)
        return [self.sizes.write(size) for size in (*grid, self.sparse.start)]

    def add_input(
        self, name: str, blocks: Sequence[int] = (), dtype: torch.dtype = torch.int32
    ) -> Node:
        """A placeholder for state: `[B, H, N / block, ...]`, sized as the query."""
        example = self.sparse.site.query.meta["example_value"]
        batch, heads = (example.shape[0], 1) if example.dim() == 3 else example.shape[:2]
        axes = [(example.shape[-2] + block - 1) // block for block in blocks]
        state = example.new_empty((batch, heads, *axes), dtype=dtype)
        return append_placeholder(self.gm, f"ditopt_{name}_{self.index}", state)

    def add_flag(self, name: str) -> Node:
        """A placeholder for one truth value, which is on the processor: reading it waits for no
        device."""
        example = self.sparse.site.query.meta["example_value"]
        flag = example.new_empty((), dtype=torch.bool, device="cpu")
        return append_placeholder(self.gm, f"ditopt_{name}_{self.index}", flag)

    def add_boost(self) -> Node | None:
        """How much more each head is to keep; every guarded search takes it."""
        return self.add_input("boost", dtype=torch.float32) if self.form.guard else None

    def write_expected(self, statistics: tuple[Node, ...]) -> Node | None:
        """What a plan should keep: what it kept when it was made, or the quality asked for."""
        if not self.form.guard:
            return None
        if self.form.reuse:
            return self.add_input("kept", dtype=torch.float32)
        if self.sparse.by_density:
            return None
        return self.graph.call_function(torch.full_like, (statistics[0], self.sparse.target))


@dataclass(frozen=True)
class Routed:
    """What `write_plan` wrote for one site.

    Attributes:
        q, k, v, bias: the inputs of attention, in the plan's order.
        counts, indices: the lists.
        plan: what a later call needs to do without a search.
        statistics: recall and density, each `[B or 1, H]`; none without a search.
        expected: the mass that the guard wants kept, `[B, H]`; None catches a head for NaN only.
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
    """Whether a router weighs blocks in one order for all heads, which cubes make compact."""
    return router in ("adaspa", "subblock", "sol")


def count_plan_tensors(router: str, boosted: bool) -> int:
    """How many tensors a router keeps from one search to the next; see `SparseForm.boosted`."""
    return {"full": 0, "frame_tile": int(boosted), "headwise": 2, "oracle": 2}.get(router, 1)


def can_ask(router: str) -> bool:
    """Whether a router has an operator that searches or keeps a plan, as it is told."""
    return router in ("headwise", "oracle")


def make_blank_plan(batch: int, heads: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for the plan of a router that can be asked before there is one."""
    words = [-(-tokens // block) for block in (BLOCK_Q, BLOCK_K * WORD)]
    return (
        torch.zeros(batch, heads, *words, dtype=torch.int32, device="cpu"),
        torch.zeros(batch, heads, dtype=torch.int32, device="cpu"),
    )


def write_plan(place: Place) -> Routed:
    """Write the router's nodes at the graph's insertion point."""
    write = {
        "full": _write_full,
        "rainfusion": _write_rainfusion,
        "frame_tile": _write_frame_tile,
        "headwise": _write_headwise,
        "oracle": _write_headwise,
    }.get(place.sparse.router, _write_search)
    return write(place)


def _write_full(place: Place) -> Routed:
    graph, (q, k, v) = place.graph, place.qkv
    length = _length(graph, k)
    plan = graph.call_function(torch.ops.ditopt.keep_all_v1.default, (q, length, BLOCK_Q, BLOCK_K))
    return Routed(q, k, v, place.bias, *unpack(graph, plan, 2), (), (), None, None)


def _write_rainfusion(place: Place) -> Routed:
    graph, sparse, bias = place.graph, place.sparse, place.bias
    ops, call, (q, k, v) = torch.ops.ditopt, graph.call_function, place.qkv
    where = place.write_grid()
    statistics: tuple[Node, ...] = ()
    if place.form.reuse:
        choice = place.add_input("choice")
    else:
        goal = (sparse.scale, sparse.target, sparse.by_density)
        found = call(
            ops.rainfusion_recognize_v1.default,
            (q, k, bias, *goal, *where, BLOCK_Q, BLOCK_K, place.add_boost()),
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
    expected = place.write_expected(statistics)
    return Routed(
        q, k, v, bias, counts, indices, (choice,), statistics, expected, inverse, per_head=True
    )


def _write_frame_tile(place: Place) -> Routed:
    graph, (q, k, v) = place.graph, place.qkv
    # The tiles follow from shapes; only which heads the guard made dense is kept.
    boost = place.add_input("boost", dtype=torch.float32) if place.form.boosted else None
    plan = graph.call_function(
        torch.ops.ditopt.frame_tile_plan_v1.default,
        (q, place.sparse.target, *place.write_grid(), BLOCK_Q, BLOCK_K, boost),
    )
    counts, indices, recall, density = unpack(graph, plan, 4)
    statistics = () if place.form.reuse else (recall, density)
    kept = () if boost is None else (boost,)
    expected = place.write_expected(statistics)
    return Routed(q, k, v, place.bias, counts, indices, kept, statistics, expected, None)


def _write_headwise(place: Place) -> Routed:
    graph, sparse, bias = place.graph, place.sparse, place.bias
    ops, call, (q, k, v) = torch.ops.ditopt, graph.call_function, place.qkv
    where = (*place.write_grid(), BLOCK_Q, BLOCK_K)
    statistics: tuple[Node, ...] = ()
    goal = (sparse.scale, sparse.target, sparse.by_density)
    cell = 1 if sparse.router == "oracle" else HEADWISE_CELL
    search = (q, k, bias, *goal, *where, cell)
    if place.form.reuse:
        words, counts, indices = _read_lists(place)
        order = place.add_input("order")
    elif place.form.asks:
        told = (place.add_flag("fresh"), _add_words(place), place.add_input("order"))
        found = call(ops.headwise_search_or_reuse_v1.default, (*told, *search))
        counts, indices, order, words, *rest = unpack(graph, found, 6)
        statistics = tuple(rest)
    else:
        found = call(ops.headwise_plan_v2.default, (*search, place.add_boost()))
        counts, indices, order, *rest = unpack(graph, found, 5)
        words, statistics = _write_lists(place, counts, indices), tuple(rest)
    moves = call(ops.headwise_rows_v1.default, (order, _length(graph, q), *where))
    rows, inverse = unpack(graph, moves, 2)
    q, k, v = (call(ops.gather_tokens_v1.default, (x, rows)) for x in (q, k, v))
    if bias is not None:
        bias = call(ops.gather_bias_v1.default, (bias, rows))
    plan, expected = (words, order), place.write_expected(statistics)
    return Routed(
        q, k, v, bias, counts, indices, plan, statistics, expected, inverse, per_head=True
    )


def _write_search(place: Place) -> Routed:
    """The routers that weigh blocks, in the cube order where there is a grid.

    Tokens that are in the order already stay where they are.
    """
    graph, sparse, bias = place.graph, place.sparse, place.bias
    (q, k, v), inverse = place.qkv, None
    if sparse.grid is not None and not sparse.ordered:
        order = graph.call_function(
            torch.ops.ditopt.cube_order_v1.default, (q, *place.write_grid(), _length(graph, q))
        )
        rows, inverse = unpack(graph, order, 2)
        q, k, v = (_select(graph, x, rows) for x in (q, k, v))
        if bias is not None:
            bias = graph.call_function(torch.index_select, (bias, 2, rows))
    if place.form.reuse:
        words, counts, indices = _read_lists(place)
        expected = place.write_expected(())
        return Routed(q, k, v, bias, counts, indices, (words,), (), expected, inverse)
    video = [place.sizes.write(size) for size in (sparse.start, sparse.video)]
    boost = place.add_boost()
    search, arguments = _name_search(sparse, q, k, bias, (*video, BLOCK_Q, BLOCK_K))
    found = graph.call_function(search, arguments, {} if boost is None else {"boost": boost})
    counts, indices, recall, density = unpack(graph, found, 4)
    plan, statistics = (_write_lists(place, counts, indices),), (recall, density)
    expected = place.write_expected(statistics)
    return Routed(q, k, v, bias, counts, indices, plan, statistics, expected, inverse)


def _write_lists(place: Place, counts: Node, indices: Node) -> Node:
    """The lists as they are kept, one bit for each block."""
    length = _length(place.graph, place.qkv[1])
    arguments = (counts, indices, length, BLOCK_K)
    return place.graph.call_function(torch.ops.ditopt.pack_plan_v1.default, arguments)


def _add_words(place: Place) -> Node:
    return place.add_input("words", [BLOCK_Q, BLOCK_K * WORD])


def _read_lists(place: Place) -> tuple[Node, Node, Node]:
    """The kept words as an input of the graph, and the counts and lists in them."""
    words = _add_words(place)
    length = _length(place.graph, place.qkv[1])
    lists = place.graph.call_function(
        torch.ops.ditopt.unpack_plan_v1.default, (words, length, BLOCK_K)
    )
    counts, indices = unpack(place.graph, lists, 2)
    return words, counts, indices


def _name_search(
    sparse: SparseSite, q: Node, k: Node, bias: Node | None, where: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]]:
    """The operator of a searching router and its arguments.

    `where`: start and length of the video among the tokens, then both block sizes.
    """
    ops, goal = torch.ops.ditopt, (sparse.scale, sparse.target, sparse.by_density, *where)
    if sparse.router == "sol":
        return ops.subblock_plan_v2.default, (q, k, bias, *goal, BLOCK_Q, BLOCK_K)
    if sparse.router == "subblock":
        return ops.subblock_plan_v2.default, (q, k, bias, *goal, CELL, CELL)
    return ops.adaspa_plan_v2.default, (q, k, bias, *goal, ROW_STEP)


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
