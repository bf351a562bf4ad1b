"""The plan that keeps every block, for `density=1`.

It runs the sparse kernel on the whole score matrix, which is how the kernel's exactness is checked
against dense attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "keep_all_v1(Tensor like_q, SymInt Nk, int block_q, int block_k) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@torch.library.impl(_library, "keep_all_v1", "CompositeExplicitAutograd")
def keep_all(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Full lists for queries [B, H, Nq, D] against Nk keys, in the model's own token order.

    Returns counts int32 [1, H, nq] and indices int32 [1, H, nq, nk].
    """
    counts, indices = _fake(*arguments)
    counts.fill_(indices.shape[-1])
    indices.copy_(torch.arange(indices.shape[-1], device=indices.device))
    return counts, indices


@torch.library.register_fake("ditopt::keep_all_v1", lib=_library)
def _fake(like_q: Tensor, Nk: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    rows = (1, like_q.shape[1], ceil_div(like_q.shape[2], block_q))
    counts = like_q.new_empty(rows, dtype=torch.int32)
    return counts, like_q.new_empty((*rows, ceil_div(Nk, block_k)), dtype=torch.int32)
