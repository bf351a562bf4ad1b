"""The centroid router: blocks whose mean query and mean key agree more than is usual.

The rule of Sol-Attn, arXiv 2607.24027, as a plan: keep what scores above the mean of its row by
`tau` standard deviations, of the scores themselves rather than of a diagonal estimate. How much
that keeps is only known afterwards; a quality or density target turns the same scores into mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.routers.budgets import Spread, allot_blocks, list_blocks
from dit_opt.kernels.routers.plan import (
    BlockLayout,
    Plan,
    check_request,
    describe_plan,
    lay_blocks,
)
from dit_opt.kernels.routers.pooling import score_blocks, share_mass

_TARGETS = ("tau", "quality", "density")

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "sol_plan_v1(Tensor q, Tensor k, Tensor? key_bias, float scale, float target, str by, "
    "SymInt video_start, SymInt video_tokens, int block_q, int block_k, str spread='need', "
    "SymInt? capacity=None, Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor recall, Tensor density)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def plan(
    q: Tensor,
    k: Tensor,
    scale: float,
    blocks: BlockLayout,
    *,
    tau: float | None = None,
    quality: float | None = None,
    density: float | None = None,
    key_bias: Tensor | None = None,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> Plan:
    """The plan for q [B, H, N, D] and k [B, Hk, N, D] from one mean per block.

    Exactly one of `tau`, `quality` and `density` is given; key_bias as in `measure_block_mass`,
    the rest as in `allot_blocks`, of which tau knows neither spread nor boost. Scores of a Gaussian
    row keep 16 % at tau = 1 and 2.7 % at 2.

    Raises ValueError for shapes, targets or a capacity that do not fit.
    """
    check_request(q, k, blocks, capacity)
    if sum(target is not None for target in (tau, quality, density)) != 1:
        raise ValueError(
            f"tau is {tau}, quality is {quality} and density is {density}; give exactly one."
        )
    block_q, block_k = blocks.block_q, blocks.block_k
    scores = score_blocks(q, k, scale, block_q, block_k, block_q, block_k, key_bias)
    mass = share_mass(scores)
    if tau is not None:
        kept = _stand_out(scores, tau)
        return list_blocks(kept, mass, blocks=blocks, capacity=capacity)
    return allot_blocks(
        mass,
        blocks=blocks,
        quality=quality,
        density=density,
        spread=spread,
        capacity=capacity,
        boost=boost,
    )


def _stand_out(scores: Tensor, tau: float) -> Tensor:
    """Which blocks score above mean + tau * deviation of their row; masked ones count nowhere."""
    real = scores > -torch.inf
    number = real.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(real, scores, 0.0).sum(-1, keepdim=True) / number
    spread = torch.where(real, scores - mean, 0.0).square().sum(-1, keepdim=True) / number
    return scores > mean + tau * spread.sqrt()


@torch.library.impl(_library, "sol_plan_v1", "CompositeExplicitAutograd")
def _plan(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by: str,
    video_start: int,
    video_tokens: int,
    block_q: int,
    block_k: int,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if by not in _TARGETS:
        raise ValueError(f"The target is named {by!r}; it is one of {', '.join(_TARGETS)}.")
    blocks = lay_blocks(q.shape[2], video_start, video_tokens, block_q, block_k, q.device)
    options = {"key_bias": key_bias, "spread": spread, "capacity": capacity, "boost": boost}
    return plan(q, k, scale, blocks, **{by: target}, **options).tensors


@torch.library.register_fake("ditopt::sol_plan_v1", lib=_library)
def _describe(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by: str,
    video_start: int,
    video_tokens: int,
    block_q: int,
    block_k: int,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return describe_plan(q, k, block_q, block_k, capacity)
