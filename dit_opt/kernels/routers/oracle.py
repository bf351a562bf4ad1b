"""The router that knows the answer: exact softmax mass of the queries and keys at hand.

A yardstick for measuring what other routers lose, at a cost near that of dense attention.
"""

from __future__ import annotations

from torch import Tensor

from dit_opt.kernels.routers.block_mass import measure_block_mass
from dit_opt.kernels.routers.budgets import Spread, allot_blocks
from dit_opt.kernels.routers.plan import BlockLayout, Plan, check_request


def plan(
    q: Tensor,
    k: Tensor,
    scale: float,
    blocks: BlockLayout,
    *,
    quality: float | None = None,
    density: float | None = None,
    key_bias: Tensor | None = None,
    spread: Spread = "need",
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> Plan:
    """The best lists for q [B, H, N, D] and k [B, Hk, N, D]; targets as in `allot_blocks`.

    Raises ValueError for shapes, targets or a capacity that do not fit.
    """
    check_request(q, k, blocks, capacity)
    mass, _ = measure_block_mass(q, k, scale, blocks.block_q, blocks.block_k, key_bias)
    return allot_blocks(
        mass,
        blocks=blocks,
        quality=quality,
        density=density,
        spread=spread,
        capacity=capacity,
        boost=boost,
    )
