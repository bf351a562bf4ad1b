"""An order of the tokens for each head, and in it the blocks that hold most softmax mass.

Block lists are worth as much as the order that they are made in: a head that looks at one place
through all frames is sparse in columns and dense in frames, and one that looks around itself the
other way round. RainFusion (arXiv 2505.21036) picks an order and a fixed pattern for each head,
AdaSpa (arXiv 2502.21079) searches blocks in one order for all; this router picks the order and
searches in it. Rows drawn one out of each small cell of the video stand for their neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.routers.budgets import Spread, allot_blocks, rate_recall
from dit_opt.kernels.routers.head_orders import HeadOrders, build_orders, list_orders
from dit_opt.kernels.routers.orders import VideoLayout
from dit_opt.kernels.routers.plan import Plan, check_request, describe_plan
from dit_opt.kernels.routers.sampled_mass import RowMeans, measure_sampled_mass

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
    mass = _measure_mass(q, k, scale, orders, key_bias)
    rated = rate_recall(mass, density or _COMPARED_DENSITY, orders.blocks)
    # Of orders that serve alike the first one, or rounding would choose.
    handicap = _MARGIN * torch.arange(len(orders.orders), device=q.device)
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


def _measure_mass(
    q: Tensor, k: Tensor, scale: float, orders: HeadOrders, key_bias: Tensor | None
) -> Tensor:
    """What each block of keys holds of the softmax of each query block, in each order: float32
    [B, H, O, nq, nk]."""
    if isinstance(orders.means, RowMeans):
        # Imported here because Triton is absent where there is no GPU to run it on.
        from dit_opt.kernels.routers import sampled_mass_triton

        return sampled_mass_triton.launch(
            q, k, orders.orders, orders.means, scale, key_bias, orders.blocks.block_k
        )
    batch, heads = q.shape[:2]
    kinds, query_blocks, _ = orders.means.shape
    key_blocks = len(orders.blocks.key_sizes)
    shape = (batch, k.shape[1], heads // k.shape[1], kinds, query_blocks, key_blocks)
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for part in measure_sampled_mass(q, k, orders.rows, orders.sums, scale, key_bias):
        # [keys, O * nk, group, rows] as [keys, group, O, rows, nk]
        found = part.mass.unflatten(1, (kinds, key_blocks)).permute(0, 3, 1, 4, 2)
        mass[part.item, part.keys, part.group] += orders.means[..., part.rows] @ found
    return mass.flatten(1, 2)


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
