"""An order of the tokens for each head, and in it the blocks that hold most softmax mass.

Block lists are worth as much as the order that they are made in: a head that looks at one place
through all frames is sparse in columns and dense in frames, and one that looks around itself the
other way round. RainFusion (arXiv 2505.21036) picks an order and a fixed pattern for each head,
AdaSpa (arXiv 2502.21079) searches blocks in one order for all; this router picks the order and
searches in it. Rows drawn one out of each small cell of the video stand for their neighbours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.routers.budgets import Spread, allot_blocks, rate_recall
from dit_opt.kernels.routers.orders import (
    VideoLayout,
    cut_evenly,
    invert_order,
    locate_tokens,
    order_columns,
    order_cubes,
    order_raster,
)
from dit_opt.kernels.routers.plan import (
    BlockLayout,
    Plan,
    check_request,
    describe_plan,
    lay_blocks,
)
from dit_opt.kernels.routers.sample import GOLDEN_RATIO
from dit_opt.kernels.routers.sampled_mass import Sums, lay_sums, measure_sampled_mass
from dit_opt.kernels.routers.tables import choose_strip

# Where candidates stand in `HeadOrders.orders`.
ORDER_NAMES = ("raster", "columns", "cubes")

# The density at which orders are compared where a quality is asked for, and not a density.
_COMPARED_DENSITY = 0.15

# By how much recall an order must beat the one before it.
_MARGIN = 1e-3

_library = torch.library.Library("ditopt", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define(
    "headwise_plan_v1(Tensor q, Tensor k, Tensor? key_bias, float scale, float target, "
    "bool by_density, SymInt T, SymInt H, SymInt W, SymInt video_start, int block_q, int block_k, "
    "int cell=16, str spread='even', Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor order, Tensor recall, Tensor density)",
    tags=_TAGS,
)
_library.define(
    "headwise_refresh_v1(Tensor fresh, Tensor words, Tensor order, Tensor q, Tensor k, "
    "Tensor? key_bias, float scale, float target, bool by_density, SymInt T, SymInt H, SymInt W, "
    "SymInt video_start, int block_q, int block_k, int cell=16, str spread='even') "
    "-> (Tensor counts, Tensor indices, Tensor order, Tensor words, Tensor recall, Tensor density)",
    tags=_TAGS,
)
_library.define(
    "headwise_rows_v1(Tensor order, SymInt N, SymInt T, SymInt H, SymInt W, SymInt video_start, "
    "int block_q, int block_k) -> (Tensor rows, Tensor inverse)",
    tags=_TAGS,
)


@dataclass(frozen=True, eq=False)
class HeadOrders:
    """The orders that heads choose from, and the rows that they are searched with.

    `orders` int64 [O, N], text behind the video in each. `blocks`: those of every order. `rows`
    int64 [m]: sampled queries, in the model's own order. `weights` float32 [O, nq, m]: each query
    block's mean over its rows; the nearest row stands for a block without any. `sums` are those of
    all key blocks.
    """

    orders: Tensor
    blocks: BlockLayout
    rows: Tensor
    weights: Tensor
    sums: tuple[Sums, ...]


# A grid has entries for the processor and for a device.
@functools.lru_cache(maxsize=16)
def list_orders(
    layout: VideoLayout, block_q: int, block_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The candidates of `ORDER_NAMES` and their inverses, int64 [O, N] each; cached."""
    orders = torch.stack(
        [
            order_raster(layout),
            order_columns(layout, choose_strip(layout, block_q, block_k)),
            order_cubes(layout),
        ]
    )
    return orders.to(device), invert_order(orders).to(device)


@functools.lru_cache(maxsize=8)
def build_orders(
    layout: VideoLayout, block_q: int, block_k: int, cell: int, device: torch.device
) -> HeadOrders:
    """The orders of one grid, and one row out of `cell` tokens; cached.

    Raises ValueError for a cell that is no power of two, or an empty block.
    """
    if cell < 1 or cell & (cell - 1):
        raise ValueError(f"cell={cell} is no power of two; one row stands for so many tokens.")
    blocks = lay_blocks(layout.tokens, 0, layout.video_tokens, block_q, block_k, device)
    orders, inverses = list_orders(layout, block_q, block_k, torch.device("cpu"))
    rows = sample_cells(layout, cell)
    return HeadOrders(
        orders=orders.to(device),
        blocks=blocks,
        rows=rows.to(device),
        weights=_weigh_rows(inverses[:, rows], layout.tokens, block_q).to(device),
        sums=lay_sums(orders, block_k, device),
    )


def sample_cells(layout: VideoLayout, cell: int) -> Tensor:
    """One video token out of each box of about `cell` tokens, int64 [m], ascending.

    Which one differs from box to box, by a sequence that fills the interval evenly: rows at one
    place of all boxes would meet the same place of all blocks.
    """
    sizes = [1, 1, 1]
    extents = (layout.frames, layout.height, layout.width)
    while sizes[0] * sizes[1] * sizes[2] < cell:
        # Doubles the thinnest axis that has room: w before h before t.
        axis = min((2, 1, 0), key=lambda a: (2 * sizes[a] > extents[a], sizes[a]))
        sizes[axis] *= 2
    places = locate_tokens(layout)
    box = torch.zeros(layout.video_tokens, dtype=torch.int64)
    for axis, (extent, size) in enumerate(zip(extents, sizes)):
        parts = cut_evenly(extent, size)
        box = box * int(parts[-1] + 1) + parts[places[:, axis]]
    members = box.argsort(stable=True)
    counts = box.bincount()
    first = counts.cumsum(0) - counts
    number = torch.arange(len(counts))
    drawn = ((number + 1) * GOLDEN_RATIO % 1 * counts).long().clamp(max=counts - 1)
    return members[first + drawn].sort().values + layout.video_start


def plan(
    q: Tensor,
    k: Tensor,
    scale: float,
    orders: HeadOrders,
    *,
    quality: float | None = None,
    density: float | None = None,
    key_bias: Tensor | None = None,
    spread: Spread = "even",
    boost: Tensor | None = None,
) -> tuple[Plan, Tensor]:
    """The plan for q [B, H, N, D] and k [B, Hk, N, D] in the model's own order, and the order of
    each head, int32 [B, H], in which its lists are meant.

    A head takes the order in which lists of one density keep most mass. Targets, spread and boost
    are those of `allot_blocks`. The recall is that of the sampled rows, exact where all are.

    Raises ValueError for shapes and targets that do not fit.
    """
    check_request(q, k, orders.blocks, None)
    batch, heads = q.shape[:2]
    kinds = len(orders.orders)
    query_blocks, key_blocks = orders.weights.shape[1], len(orders.blocks.key_sizes)
    shape = (batch, k.shape[1], heads // k.shape[1], kinds, query_blocks, key_blocks)
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for part in measure_sampled_mass(q, k, orders.rows, orders.sums, scale, key_bias):
        # [keys, O * nk, group, rows] as [keys, group, O, rows, nk]
        found = part.mass.unflatten(1, (kinds, key_blocks)).permute(0, 3, 1, 4, 2)
        mass[part.item, part.keys, part.group] += orders.weights[..., part.rows] @ found
    mass = mass.flatten(1, 2)
    rated = rate_recall(mass, density or _COMPARED_DENSITY, orders.blocks)
    # Of orders that serve alike the first one, or rounding would choose.
    handicap = _MARGIN * torch.arange(kinds, device=q.device)
    order = (rated - handicap).argmax(-1)
    where = order[..., None, None, None].expand(-1, -1, 1, *mass.shape[3:])
    chosen = allot_blocks(
        mass.gather(2, where).squeeze(2),
        blocks=orders.blocks,
        quality=quality,
        density=density,
        spread=spread,
        boost=boost,
    )
    return chosen, order.int()


def _weigh_rows(places: Tensor, tokens: int, block_q: int) -> Tensor:
    """Float32 [O, nq, m] for rows at `places` int64 [O, m] of each order."""
    middles = torch.arange(0, tokens, block_q) + (block_q - 1) / 2
    held = (places[:, None] // block_q == torch.arange(len(middles))[:, None]).float()
    nearest = (places[:, None] - middles[:, None]).abs().argmin(-1, keepdim=True)
    nearest = torch.zeros_like(held).scatter_(-1, nearest, 1.0)
    held = torch.where(held.any(-1, keepdim=True), held, nearest)
    return held / held.sum(-1, keepdim=True)


@torch.library.impl(_library, "headwise_plan_v1", "CompositeExplicitAutograd")
def _plan(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    T: int,
    H: int,
    W: int,
    video_start: int,
    block_q: int,
    block_k: int,
    cell: int = 16,
    spread: Spread = "even",
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = VideoLayout(T, H, W, video_start, q.shape[2])
    chosen, order = plan(
        q,
        k,
        scale,
        build_orders(layout, block_q, block_k, cell, q.device),
        quality=None if by_density else target,
        density=target if by_density else None,
        key_bias=key_bias,
        spread=spread,
        boost=boost,
    )
    return chosen.counts, chosen.indices, order, chosen.recall, chosen.density


@torch.library.register_fake("ditopt::headwise_plan_v1", lib=_library)
def _describe(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    T: int,
    H: int,
    W: int,
    video_start: int,
    block_q: int,
    block_k: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    counts, indices, recall, density = describe_plan(q, k, block_q, block_k, None)
    return counts, indices, q.new_empty(q.shape[:2], dtype=torch.int32), recall, density


@torch.library.impl(_library, "headwise_refresh_v1", "CompositeExplicitAutograd")
def _refresh(
    fresh: Tensor,
    words: Tensor,
    order: Tensor,
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    T: int,
    H: int,
    W: int,
    video_start: int,
    block_q: int,
    block_k: int,
    cell: int = 16,
    spread: Spread = "even",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A new plan, and its lists in bits, where `fresh` (on the processor) says so; the one that is
    given where it does not, whose recall and density are NaN.

    One graph can then serve both, where no CUDA graph replays it without asking.
    """
    ops = torch.ops.ditopt
    if not fresh:
        counts, indices = ops.unpack_plan_v1(words, q.shape[2], block_k)
        unknown = order.new_full(order.shape, torch.nan, dtype=torch.float32)
        return counts, indices, order.clone(), words.clone(), unknown, unknown.clone()
    where = (T, H, W, video_start, block_q, block_k)
    goal = (scale, target, by_density)
    counts, indices, order, *statistics = _plan(q, k, key_bias, *goal, *where, cell, spread)
    words = ops.pack_plan_v1(counts, indices, q.shape[2], block_k)
    recall, density = statistics
    return counts, indices, order, words, recall, density


@torch.library.register_fake("ditopt::headwise_refresh_v1", lib=_library)
def _describe_refresh(
    fresh: Tensor,
    words: Tensor,
    order: Tensor,
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    T: int,
    H: int,
    W: int,
    video_start: int,
    block_q: int,
    block_k: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    counts, indices, recall, density = describe_plan(q, k, block_q, block_k, None)
    return counts, indices, torch.empty_like(order), torch.empty_like(words), recall, density


@torch.library.impl(_library, "headwise_rows_v1", "CompositeExplicitAutograd")
def _rows(
    order: Tensor, N: int, T: int, H: int, W: int, video_start: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    layout = VideoLayout(T, H, W, video_start, N)
    orders, inverses = list_orders(layout, block_q, block_k, order.device)
    return orders[order.long()], inverses[order.long()]


@torch.library.register_fake("ditopt::headwise_rows_v1", lib=_library)
def _describe_rows(order: Tensor, N: int, *_: object) -> tuple[Tensor, Tensor]:
    rows = order.new_empty((*order.shape, N), dtype=torch.int64)
    return rows, torch.empty_like(rows)
