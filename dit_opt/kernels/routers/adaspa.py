"""AdaSpa's router: an exact search for the heavy blocks, whose row sums the next search reuses.

Patterns hardly move between steps, so a search is rare; it reads the true softmax mass of every
block, and budgets follow the need of each head and row. Source: AdaSpa, arXiv 2502.21079; its two
budgets for good and bad heads are replaced by one threshold on mass for all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.routers.block_mass import measure_block_mass
from dit_opt.kernels.routers.budgets import Spread, allot_blocks
from dit_opt.kernels.routers.plan import (
    BlockLayout,
    Plan,
    check_request,
    describe_plan,
    lay_blocks,
)
from dit_opt.kernels.routers.sample import GOLDEN_RATIO

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "adaspa_plan_v1(Tensor q, Tensor k, Tensor? key_bias, Tensor? lse, float scale, float target, "
    "bool by_density, SymInt video_start, SymInt video_tokens, int block_q, int block_k, "
    "int row_step=1, str spread='need', SymInt? capacity=None, Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor recall, Tensor density, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def plan(
    q: Tensor,
    k: Tensor,
    scale: float,
    blocks: BlockLayout,
    *,
    quality: float | None = None,
    density: float | None = None,
    key_bias: Tensor | None = None,
    lse: Tensor | None = None,
    row_step: int = 1,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Plan, Tensor]:
    """The plan for q [B, H, N, D] and k [B, Hk, N, D], and the log-sum-exp for the next search.

    Args:
        key_bias, lse: as in `measure_block_mass`; a cached lse saves a GPU half of the search.
        row_step: one of so many neighbouring queries stands for them, which divides the cost of the
            search; 1 is exact. It must divide block_q. Which one differs from group to group:
            equal strides would meet one place of every cube of an order.
        quality, density, spread, capacity, boost: as in `allot_blocks`.

    Returns the plan, whose recall is exact for the searched rows (with a cached lse, up to how it
    has aged within a block), and their lse now, float32 [B, H, ceil(N / row_step)].

    Raises ValueError for shapes, targets, a capacity or a step that do not fit.
    """
    check_request(q, k, blocks, capacity)
    if row_step < 1 or blocks.block_q % row_step:
        raise ValueError(
            f"row_step={row_step} does not divide blocks of {blocks.block_q} queries; "
            "take a power of two."
        )
    block_q = blocks.block_q // row_step
    rows = q if row_step == 1 else q.index_select(2, _draw_rows(q.shape[2], row_step, q.device))
    mass, found = measure_block_mass(rows, k, scale, block_q, blocks.block_k, key_bias, lse)
    if lse is not None:
        total = mass.sum(-1, keepdim=True)
        mass = mass / torch.where(total > 0, total, 1.0)
    chosen = allot_blocks(
        mass,
        blocks=blocks,
        quality=quality,
        density=density,
        spread=spread,
        capacity=capacity,
        boost=boost,
    )
    return chosen, found


def _draw_rows(queries: int, step: int, device: torch.device) -> Tensor:
    """One row of each `step` neighbours, int64 [ceil(queries / step)], ascending."""
    group = torch.arange(ceil_div(queries, step), device=device)
    place = ((group + 1) * GOLDEN_RATIO % 1 * step).long()
    return (group * step + place).clamp(max=queries - 1)


@torch.library.impl(_library, "adaspa_plan_v1", "CompositeExplicitAutograd")
def _plan(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    video_start: int,
    video_tokens: int,
    block_q: int,
    block_k: int,
    row_step: int = 1,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    blocks = lay_blocks(q.shape[2], video_start, video_tokens, block_q, block_k, q.device)
    chosen, found = plan(
        q,
        k,
        scale,
        blocks,
        quality=None if by_density else target,
        density=target if by_density else None,
        key_bias=key_bias,
        lse=lse,
        row_step=row_step,
        spread=spread,
        capacity=capacity,
        boost=boost,
    )
    return *chosen.tensors, found


@torch.library.register_fake("ditopt::adaspa_plan_v1", lib=_library)
def _describe(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    video_start: int,
    video_tokens: int,
    block_q: int,
    block_k: int,
    row_step: int = 1,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = (*q.shape[:2], ceil_div(q.shape[2], row_step))
    found = q.new_empty(rows, dtype=torch.float32)
    return *describe_plan(q, k, block_q, block_k, capacity), found
