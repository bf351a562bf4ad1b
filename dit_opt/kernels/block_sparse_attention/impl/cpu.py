"""Block-sparse attention on a CPU: which implementation computes a call.

An implementation is a module with two functions: `fits(call)` returns why it does not take a call,
or "" if it does, and `attend(call, out, lse)` fills the outputs of a call that is not empty.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import Arguments, new_outputs
from dit_opt.kernels.block_sparse_attention.impl.cpp import attention as cpp_attention
from dit_opt.kernels.block_sparse_attention.impl.torch import attention as torch_attention
from dit_opt.kernels.scratch import SCRATCH

# The first that fits attends; the last one takes every call.
IMPLEMENTATIONS = (cpp_attention, torch_attention)


def attend(call: Arguments) -> tuple[Tensor, Tensor]:
    """Same results as `reference.attend`; lse is [B, H, 0] unless it is wanted.

    float16 has no fast arithmetic on CPUs and is computed in float32.
    """
    out, lse = new_outputs(call.q, call.with_lse)
    if call.is_empty:
        return out.zero_(), lse.fill_(-torch.inf)
    if call.q.dtype == torch.float16:
        call = _widen(call)
    chosen = next(module for module in IMPLEMENTATIONS if not module.fits(call))
    chosen.attend(call, out, lse)
    SCRATCH.trim()
    return out, lse


def _widen(call: Arguments) -> Arguments:
    """The same call in float32."""
    names = ("q", "k", "v", "centroids", "values")
    given = {name: getattr(call, name) for name in names}
    return dataclasses.replace(
        call, **{name: x.float() for name, x in given.items() if x is not None}
    )
