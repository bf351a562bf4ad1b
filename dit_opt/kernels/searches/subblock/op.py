"""The sub-block search: an estimate of each block's mass from the means of small cells.

A few means per block see most of what the block holds, at 1 / (cell_q * cell_k) of the cost of
exact scores. Means hide the variance within a cell, so the estimate is flatter than the truth as a
rule, and a quality target then keeps more than it asks for. Source: SGLang's sub-block router (pull
request 34148 of sgl-project/sglang). With one cell per block the scores are those of Sol-Attn
(arXiv 2607.24027): cheaper, and blind to what differs within a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.plan.budgets import allot_blocks
from dit_opt.kernels.plan.plan import check_request, lay_blocks, new_plan
from dit_opt.kernels.searches.subblock.pooling import score_blocks, share_mass

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "subblock_plan_v2(Tensor q, Tensor k, Tensor? key_bias, float scale, float target, "
    "bool by_density, SymInt video_start, SymInt video_tokens, int block_q, int block_k, "
    "int cell_q, int cell_k, Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor recall, Tensor density)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "subblock_plan_v2", "CompositeExplicitAutograd")
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
    cell_q: int,
    cell_k: int,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan for q [B, H, N, D] and k [B, Hk, N, D] from means of `cell_q` queries and
    of `cell_k` keys.

    key_bias as in `measure_block_mass`, target and boost as in `allot_blocks`; the recall is that
    of the estimate. Raises ValueError for shapes, targets or cells that do not fit.
    """
    blocks = lay_blocks(q.shape[2], video_start, video_tokens, block_q, block_k, q.device)
    check_request(q, k, blocks)
    scores = score_blocks(q, k, scale, block_q, block_k, cell_q, cell_k, key_bias)
    return allot_blocks(share_mass(scores), blocks, target, by_density, boost=boost).tensors


@torch.library.register_fake("ditopt::subblock_plan_v2", lib=_library)
def _fake(q, k, key_bias, scale, target, by_density, start, video, block_q, block_k, *_):
    return new_plan(q, k, block_q, block_k)
