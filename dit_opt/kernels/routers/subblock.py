"""The sub-block router: an estimate of each block's mass from pooled cells of it.

One mean per block hides what a block holds; a few means per block see most of it at a cost of
1 / cell^2 of the exact scores. Means hide their own spread too, so the estimate is flatter than the
truth as a rule, and a quality target then keeps more than it names. Source: SGLang's sub-block
router (pull request 34148 of sgl-project/sglang).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.routers.budgets import Spread, allot_blocks
from dit_opt.kernels.routers.plan import (
    BlockLayout,
    Plan,
    check_request,
    describe_plan,
    lay_blocks,
)
from dit_opt.kernels.routers.pooling import score_blocks, share_mass

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "subblock_plan_v1(Tensor q, Tensor k, Tensor? key_bias, float scale, float target, "
    "bool by_density, SymInt video_start, SymInt video_tokens, int block_q, int block_k, "
    "int cell=16, str spread='need', SymInt? capacity=None, Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor recall, Tensor density)",
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
    cell: int = 16,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> Plan:
    """The plan for q [B, H, N, D] and k [B, Hk, N, D] from means of `cell` tokens of both.

    key_bias as in `measure_block_mass`, targets as in `allot_blocks`; the recall is the estimate's.
    Raises ValueError for shapes, targets, a capacity or cells that do not fit.
    """
    check_request(q, k, blocks, capacity)
    scores = score_blocks(q, k, scale, blocks.block_q, blocks.block_k, cell, cell, key_bias)
    return allot_blocks(
        share_mass(scores),
        blocks=blocks,
        quality=quality,
        density=density,
        spread=spread,
        capacity=capacity,
        boost=boost,
    )


@torch.library.impl(_library, "subblock_plan_v1", "CompositeExplicitAutograd")
def _plan(
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
    cell: int = 16,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = lay_blocks(q.shape[2], video_start, video_tokens, block_q, block_k, q.device)
    chosen = plan(
        q,
        k,
        scale,
        blocks,
        quality=None if by_density else target,
        density=target if by_density else None,
        key_bias=key_bias,
        cell=cell,
        spread=spread,
        capacity=capacity,
        boost=boost,
    )
    return chosen.tensors


@torch.library.register_fake("ditopt::subblock_plan_v1", lib=_library)
def _describe(
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
    cell: int = 16,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return describe_plan(q, k, block_q, block_k, capacity)
