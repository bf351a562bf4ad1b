"""The plan that keeps everything: full block lists for `density=1`.

It runs the sparse kernel on the whole score matrix, which is how its exactness is checked against
dense attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "dense_plan_v1(Tensor like_q, SymInt Nk, int block_q, int block_k) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "dense_plan_v1", "CompositeExplicitAutograd")
def plan_dense(like_q: Tensor, Nk: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Full lists for queries [B, H, Nq, D] against Nk keys, in the model's own token order.

    Returns counts int32 [1, H, nq] and indices int32 [1, H, nq, nk].
    """
    counts, indices = _describe_plan(like_q, Nk, block_q, block_k)
    counts.fill_(indices.shape[-1])
    indices.copy_(torch.arange(indices.shape[-1], device=like_q.device))
    return counts, indices


@torch.library.register_fake("ditopt::dense_plan_v1", lib=_library)
def _describe_plan(like_q: Tensor, Nk: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    heads, query_blocks = like_q.shape[1], (like_q.shape[2] + block_q - 1) // block_q
    counts = like_q.new_empty((1, heads, query_blocks), dtype=torch.int32)
    key_blocks = (Nk + block_k - 1) // block_k
    return counts, like_q.new_empty((1, heads, query_blocks, key_blocks), dtype=torch.int32)
