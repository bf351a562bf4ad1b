"""What a router is: how the key blocks of each head and query block are chosen, all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import sympy
import torch
from torch.fx import Node

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.program.emit import Emitter
from dit_opt.program.program import SlotGraph
from dit_opt.program.slots import Slot, SlotRef

# Queries need 128 rows a tile (L2 bandwidth on GPUs); keys may be finer.
BLOCK_Q = 128
BLOCK_K = 64

SizeArg: TypeAlias = "int | Node"

# How much less each head may drop than the options allow, float32 [B, H]; set by the guard.
BOOST = Slot("guard.boost", blank=1.0)


@dataclass(frozen=True)
class Goal:
    """What a router aims at: `target` is a density if `by_density`, else softmax mass per head."""

    target: float
    by_density: bool


@dataclass(frozen=True)
class SiteWriter:
    """Where a router writes its nodes, and for what.

    Attributes:
        graph: the graph with its slots. emit: writes nodes in front of the site.
        place, anchor: of the slots of the site; see `SlotRef`.
        q, k, v: `[B, H, N, D]`, keys and values of as many heads or a fraction of them.
        bias: float32 `[B, 1, Nk]`, added to scores, or None.
        scale, goal: factor of the scores; what to keep.
        grid: T, H, W and the first latent token; a row of tokens where there is no grid.
        video: the number of latent tokens.
        has_grid: whether the grid is proved. ordered: tokens stand in the cube order already.
        guarded: the guard runs in this mode, and searches take a boost. boosted: it runs in some
            mode of the graph.
    """

    graph: SlotGraph
    emit: Emitter
    place: int
    anchor: int | None
    q: Node
    k: Node
    v: Node
    bias: Node | None
    scale: float
    goal: Goal
    grid: tuple[SizeArg, SizeArg, SizeArg, SizeArg]
    video: SizeArg
    has_grid: bool
    ordered: bool
    guarded: bool
    boosted: bool

    @property
    def length(self) -> SizeArg:
        """The number of tokens."""
        return self.emit.size(self.q, -2)

    def ref(self, slot: Slot) -> SlotRef:
        """The slot at this site."""
        return SlotRef(slot, self.place, self.anchor)

    def read(
        self, slot: Slot, blocks: Sequence[int] = (), dtype: torch.dtype = torch.int32
    ) -> Node:
        """The value of a slot, `[B, H, ceil(N / block), ...]`."""
        example: torch.Tensor = self.q.meta["example_value"]
        batch, heads, tokens, _ = example.shape
        axes = [(tokens + block - 1) // block for block in blocks]
        return self.graph.read(
            self.ref(slot), example.new_empty((batch, heads, *axes), dtype=dtype)
        )

    def read_boost(self) -> Node | None:
        """How much more each head is to keep; None where no guard asks for it."""
        return self.read(BOOST, dtype=torch.float32) if self.guarded else None


@dataclass(frozen=True)
class Routed:
    """What a router wrote for one site.

    Attributes:
        q, k, v, bias: the inputs of attention, in the plan's order.
        counts, indices: the lists of kept blocks.
        state: values of the router's slots, which a later call can restore the plan from.
        recall, density: float32 `[B or 1, H]`, of a search; None where the plan was restored.
        inverse: the permutation that moves the output back, or None. per_head: it has one for
            each head, and not one for all.
    """

    q: Node
    k: Node
    v: Node
    bias: Node | None
    counts: Node
    indices: Node
    state: Mapping[Slot, Node] = field(default_factory=dict)
    recall: Node | None = None
    density: Node | None = None
    inverse: Node | None = None
    per_head: bool = False

    @property
    def statistics(self) -> tuple[Node, Node]:
        """Recall and density of a search. Raises ValueError where the router gave none."""
        if self.recall is None or self.density is None:
            raise ValueError(
                "A search has to give recall and density (NaN where it knows none); this one's "
                f"Routed has recall={self.recall} and density={self.density}."
            )
        return self.recall, self.density

    def restore(self, emit: Emitter, out: Node) -> Node:
        """The output of attention in the model's own order."""
        if self.inverse is None:
            return out
        if self.per_head:
            return emit.call(torch.ops.ditopt.scatter_tokens_v1.default, out, self.inverse)
        return select_tokens(emit, out, self.inverse)


class Router:
    """One way to choose blocks; a subclass is one file and one place in `ROUTERS`.

    Attributes:
        name: in options, records and reports.
        needs_grid: its patterns are made of frames, rows and columns.
        knows_recall: it measures softmax mass, and so can aim at a quality.
        density: what it keeps where options ask for neither density nor quality; None where it
            aims at a quality.
        cube_order: it weighs blocks in one order for all heads, which cubes of tokens make compact.
        switchable: it has an operator that searches or keeps a plan as an input says, so that on
            a CPU one variant serves both modes, which halves compile time. Not on GPUs: a CUDA
            graph goes on doing what it did when it was recorded.
        searches: False for what has nothing to search and keeps no state.
        launches: operators of a search on a GPU.
        slots: the state that `restore` reads.
    """

    name: ClassVar[str]
    needs_grid: ClassVar[bool] = False
    knows_recall: ClassVar[bool] = True
    density: ClassVar[float | None] = None
    cube_order: ClassVar[bool] = False
    switchable: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    launches: ClassVar[int] = 0
    slots: ClassVar[tuple[Slot, ...]] = ()

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        """Query-key pairs that one search scores, of one head."""
        raise NotImplementedError

    def search(self, site: SiteWriter) -> Routed:
        """Write the nodes of a search."""
        raise NotImplementedError

    def restore(self, site: SiteWriter) -> Routed:
        """Write the nodes that make the plan of an earlier search again, from its slots."""
        raise NotImplementedError

    def search_or_restore(self, site: SiteWriter, searches: Node) -> Routed:
        """Both in one, as the bool `searches` says; only where `switchable`.

        Recall and density are not numbers where the plan was restored.
        """
        raise NotImplementedError

    def make_tables(self, layout: VideoLayout, goal: Goal, device: torch.device) -> list[Any]:
        """The tables that the operators of a site look up.

        They depend on shapes alone and are cached. Made inside of a CUDA graph they would lie in
        its memory and be lost with it; a graph also keeps their addresses.
        """
        return []

    def pin_tables(self, goal: Goal) -> Callable[[Sequence[int], torch.device], list[Any]]:
        """Makes the tables from (T, H, W, start, N) on a device."""
        return lambda sizes, device: self.make_tables(VideoLayout(*sizes), goal, device)

    def name_heads(
        self, sizes: Sequence[int], state: Mapping[str, torch.Tensor]
    ) -> list[str] | None:
        """The pattern or order of each head; None where a router does not tell heads apart.

        Args:
            sizes: (T, H, W, start, N). state: the values of its slots, by their names.
        """
        return None


def select_tokens(emit: Emitter, x: Node, rows: Node) -> Node:
    """Tokens of `[B, H, N, D]` in one order for all heads, in `[B, N, H, D]` memory."""
    turned = emit.method("transpose", x, 1, 2)
    return emit.method("transpose", emit.call(torch.index_select, turned, 1, rows), 1, 2)


def gather_heads(site: SiteWriter, rows: Node) -> tuple[Node, Node, Node, Node | None]:
    """Queries, keys, values and bias, each head in its own order."""
    ops, emit = torch.ops.ditopt, site.emit
    q, k, v = (emit.call(ops.gather_tokens_v1.default, x, rows) for x in (site.q, site.k, site.v))
    bias = site.bias
    if bias is not None:
        bias = emit.call(ops.gather_bias_v1.default, bias, rows)
    return q, k, v, bias
