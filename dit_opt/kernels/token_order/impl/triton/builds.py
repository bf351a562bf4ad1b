"""Launches of the kernel that moves tokens, for the linter to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dit_opt.kernels.aot import Build, make_build, make_meta
from dit_opt.kernels.launch import TYPE_NAMES
from dit_opt.kernels.token_order.impl.triton.gather import prepare_gather

# Sizes that Triton specialises for nothing, as most are.
_TOKENS, _HEADS, _KEY_HEADS = 1001, 6, 3


def list_builds(target: str) -> Iterator[Build]:
    """Every dtype and head dimension of a kind; strides that are no multiple of 16 bytes last."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dim, dtype, spare in ((128, bf16, 0), (128, fp32, 0), (80, fp16, 0), (128, bf16, 1)):
        # Rows with a spare channel have odd strides; those of x start off alignment as well.
        x = make_meta(1, _KEY_HEADS, _TOKENS, dim + spare, dtype=dtype)[..., spare:]
        out = make_meta(1, _HEADS, _TOKENS, dim + spare, dtype=dtype)[..., :dim]
        rows = make_meta(1, _HEADS, _TOKENS, dtype=torch.int64)
        config = f"gather rows D={dim} {TYPE_NAMES[dtype]}" + (" unaligned" if spare else "")
        yield make_build(target, prepare_gather(x, rows, out), config)
