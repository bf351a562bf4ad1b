"""AdaSpa's search: the exact softmax mass of every block, for rows that stand for their neighbours.

Patterns hardly change between steps, so a search is rare and may be dear; budgets follow the need
of each head and row. Source: AdaSpa, arXiv 2502.21079. Its two budgets for good and bad heads are
replaced by one threshold for all heads. Its cache of each row's log-sum-exp is left out: on GPUs a
search reads the keys once without it, too, and on CPUs it saves no time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.plan.budgets import allot_blocks
from dit_opt.kernels.plan.plan import check_request, lay_blocks, new_plan
from dit_opt.kernels.searches.mass.blocks import measure_block_mass
from dit_opt.kernels.searches.mass.sampled import GOLDEN_RATIO

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "adaspa_plan_v2(Tensor q, Tensor k, Tensor? key_bias, float scale, float target, "
    "bool by_density, SymInt video_start, SymInt video_tokens, int block_q, int block_k, "
    "int row_step, Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor recall, Tensor density)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "adaspa_plan_v2", "CompositeExplicitAutograd")
def search(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    video_start: int,
    video_tokens: int,
    block_q: int,
    block_k: int,
    row_step: int,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan for q [B, H, N, D] and k [B, Hk, N, D], whose recall is exact for searched rows.

    Args:
        key_bias: as in `measure_block_mass`.
        row_step: one of so many neighbouring queries is searched for all of them, which divides
            the cost; 1 is exact. It must divide block_q.
        target, by_density, boost: as in `allot_blocks`.

    Raises ValueError for shapes, targets or a step that do not fit.
    """
    blocks = lay_blocks(q.shape[2], video_start, video_tokens, block_q, block_k, q.device)
    check_request(q, k, blocks)
    if row_step < 1 or block_q % row_step:
        raise ValueError(
            f"row_step={row_step} does not divide blocks of {block_q} queries; take a power of two."
        )
    rows = q if row_step == 1 else q.index_select(2, draw_rows(q.shape[2], row_step, q.device))
    mass = measure_block_mass(rows, k, scale, block_q // row_step, block_k, key_bias)
    return allot_blocks(mass, blocks, target, by_density, boost=boost).tensors


def draw_rows(queries: int, step: int, device: torch.device) -> Tensor:
    """One row of each `step` neighbours, int64 [ceil(queries / step)], ascending.

    Which of them differs from group to group: with equal strides every row would stand at the same
    position of a cube of the token order.
    """
    group = torch.arange(ceil_div(queries, step), device=device)
    offset = ((group + 1) * GOLDEN_RATIO % 1 * step).long()
    return (group * step + offset).clamp(max=queries - 1)


@torch.library.register_fake("ditopt::adaspa_plan_v2", lib=_library)
def _fake(q, k, key_bias, scale, target, by_density, start, video, block_q, block_k, *_):
    return new_plan(q, k, block_q, block_k)
