"""An order of the tokens for each head, and in it the blocks that hold most softmax mass.

Block lists are worth as much as the order that they are made in: a head that looks at one position
through all frames is sparse in columns and dense in frames, and a head that looks around itself the
other way round. RainFusion (arXiv 2505.21036) picks an order and a fixed pattern for each head,
AdaSpa (arXiv 2502.21079) searches blocks in one order for all; this search picks the order and
searches in it. One row out of each small cell of the video stands for its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.plan.budgets import allot_blocks, rate_recall
from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.plan.plan import check_request, new_plan
from dit_opt.kernels.searches.headwise.head_orders import HeadOrders, build_orders, list_orders
from dit_opt.kernels.searches.mass.sampled import RowMeans, measure_sampled_mass

# The density at which orders are compared where a quality is asked for.
_COMPARED_DENSITY = 0.15

# By how much recall an order must beat the one before it.
_MARGIN = 1e-3

_library = torch.library.Library("ditopt", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_SEARCH = (
    "Tensor q, Tensor k, Tensor? key_bias, float scale, float target, bool by_density, SymInt T, "
    "SymInt H, SymInt W, SymInt video_start, int block_q, int block_k, int cell"
)
_library.define(
    f"headwise_plan_v2({_SEARCH}, Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor order, Tensor recall, Tensor density)",
    tags=_TAGS,
)
_library.define(
    f"headwise_search_or_reuse_v1(Tensor fresh, Tensor words, Tensor order, {_SEARCH}) "
    "-> (Tensor counts, Tensor indices, Tensor order, Tensor words, Tensor recall, Tensor density)",
    tags=_TAGS,
)
_library.define(
    "headwise_rows_v1(Tensor order, SymInt N, SymInt T, SymInt H, SymInt W, SymInt video_start, "
    "int block_q, int block_k) -> (Tensor rows, Tensor inverse)",
    tags=_TAGS,
)


@torch.library.impl(_library, "headwise_plan_v2", "CompositeExplicitAutograd")
def search(
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
    cell: int,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The plan for q [B, H, N, D] and k [B, Hk, N, D] in the model's own token order.

    A head takes the order in which lists of one density keep the most mass. One row is searched in
    each box of `cell` tokens; target and boost are those of `allot_blocks`.

    Returns counts and indices, the order of each head, int32 [B, H], whose blocks they name, recall
    (of the searched rows) and density. Raises ValueError for shapes and targets that do not fit.
    """
    layout = VideoLayout(T, H, W, video_start, q.shape[2])
    orders = build_orders(layout, block_q, block_k, cell, q.device)
    check_request(q, k, orders.blocks)
    mass = _measure_mass(q, k, scale, orders, key_bias)
    rated = rate_recall(mass, target if by_density else _COMPARED_DENSITY, orders.blocks)
    # Of orders that keep equally much the first one is taken, or rounding would choose.
    handicap = _MARGIN * torch.arange(len(orders.orders), device=q.device)
    order = (rated - handicap).argmax(-1)
    index = order[..., None, None, None].expand(-1, -1, 1, *mass.shape[3:])
    chosen = mass.gather(2, index).squeeze(2)
    plan = allot_blocks(chosen, orders.blocks, target, by_density, boost=boost)
    return plan.counts, plan.indices, order.int(), plan.recall, plan.density


def _measure_mass(
    q: Tensor, k: Tensor, scale: float, orders: HeadOrders, key_bias: Tensor | None
) -> Tensor:
    """The mean softmax mass of each query block in each key block of each order, float32
    [B, H, O, nq, nk]."""
    if isinstance(orders.means, RowMeans):
        # Imported here because Triton is absent where there is no GPU to run it on.
        from dit_opt.kernels.searches.mass.impl.triton import sampled as triton_sampled

        return triton_sampled.measure_orders(
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


@torch.library.register_fake("ditopt::headwise_plan_v2", lib=_library)
def _fake(q, k, key_bias, scale, target, by_density, T, H, W, video_start, block_q, block_k, *_):
    counts, indices, recall, density = new_plan(q, k, block_q, block_k)
    return counts, indices, q.new_empty(q.shape[:2], dtype=torch.int32), recall, density


@torch.library.impl(_library, "headwise_search_or_reuse_v1", "CompositeExplicitAutograd")
def search_or_reuse(
    fresh: Tensor, words: Tensor, order: Tensor, q: Tensor, k: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A new plan and its packed lists if `fresh`, a bool on the CPU, is true; else the given plan,
    with NaN for recall and density.

    So that one graph serves both; not for CUDA graphs, which do not read `fresh` in a replay.
    `arguments` are the rest of those of `search`.
    """
    # they end with block_k and cell
    ops, tokens, block_k = torch.ops.ditopt, q.shape[2], arguments[-2]
    if not fresh:
        counts, indices = ops.unpack_plan_v1(words, tokens, block_k)
        unknown = order.new_full(order.shape, torch.nan, dtype=torch.float32)
        return counts, indices, order.clone(), words.clone(), unknown, unknown.clone()
    counts, indices, order, recall, density = search(q, k, *arguments)
    words = ops.pack_plan_v1(counts, indices, tokens, block_k)
    return counts, indices, order, words, recall, density


@torch.library.register_fake("ditopt::headwise_search_or_reuse_v1", lib=_library)
def _fake_search_or_reuse(fresh, words, order, *arguments):
    counts, indices, _, recall, density = _fake(*arguments)
    return counts, indices, torch.empty_like(order), torch.empty_like(words), recall, density


@torch.library.impl(_library, "headwise_rows_v1", "CompositeExplicitAutograd")
def list_rows(
    order: Tensor, N: int, T: int, H: int, W: int, video_start: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """The permutation of each head's order and its inverse, int64 [B, H, N] each."""
    layout = VideoLayout(T, H, W, video_start, N)
    orders, inverses = list_orders(layout, block_q, block_k, order.device)
    return orders[order.long()], inverses[order.long()]


@torch.library.register_fake("ditopt::headwise_rows_v1", lib=_library)
def _fake_rows(order, N, *_):
    rows = order.new_empty((*order.shape, N), dtype=torch.int64)
    return rows, torch.empty_like(rows)
