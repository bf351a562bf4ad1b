"""What the kernel's variants share: which calls they take, and how they are launched.

A variant computes the same attention in another way that may be faster on one GPU and is unproven
on others, so nothing chooses one that was not measured there: see `tuning`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import Arguments, new_outputs
from dit_opt.kernels.block_sparse_attention.impl.triton.arguments import make_contiguous, name_plan
from dit_opt.kernels.block_sparse_attention.impl.triton.row_order import order_rows
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling, is_aligned
from dit_opt.kernels.launch import Launch, name_strides

DTYPES = (torch.bfloat16, torch.float16)
DIMS = (64, 128)
BLOCK_Q = 128
BLOCKS_K = (64, 128)


def fits(call: Arguments) -> str:
    """Why variants do not take a call; empty if they do."""
    if call.key_bias is not None or call.tail:
        found = "a bias of keys" if call.key_bias is not None else "a tail"
        return f"knows neither bias nor tail, but {found} was given"
    q, k, v = call.q, call.k, call.v
    if q.dtype not in DTYPES or q.shape[-1] not in DIMS:
        return (
            "takes bfloat16 and float16 heads of 64 or 128 channels, "
            f"not {q.dtype} ones of {q.shape[-1]}"
        )
    if call.block_q != BLOCK_Q or call.block_k not in BLOCKS_K:
        return f"takes blocks of 128 queries and 64 or 128 keys, not {call.block_q}x{call.block_k}"
    if not all(is_aligned(x) for x in (q, k, v)):
        return (
            "loads rows that are contiguous and aligned to 16 bytes, "
            f"not strides {q.stride()}, {k.stride()} and {v.stride()}"
        )
    return ""


def attend(
    variant: str,
    call: Arguments,
    prepare: Callable[[Arguments, Tensor, Tensor, Tensor], Launch],
) -> tuple[Tensor, Tensor]:
    """Same results as `triton.attention.attend`, by a variant.

    Args:
        prepare: the launch for a call, the order of its rows, `out` and `lse`.

    Raises:
        ValueError: the call is none that variants take.
    """
    reason = fits(call)
    if reason:
        raise ValueError(
            f"The {variant} variant of block-sparse attention {reason}; use a tiling with "
            "variant='plain'."
        )
    out, lse = new_outputs(call.q)
    if call.is_empty:
        return out.zero_(), lse.fill_(-torch.inf)
    call = make_contiguous(call)
    prepare(call, order_rows(call.counts), out, lse).run()
    return out, lse


def name_common(call: Arguments, order: Tensor, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """The arguments that all variants take."""
    return {
        "p_out": out,
        "p_lse": lse,
        **name_plan(call, order),
        **name_strides("o", "bhn", out),
    }


def choose_grid(call: Arguments) -> tuple[int, int]:
    """Programs by query block, and by head of the batch."""
    return call.counts.shape[2], call.q.shape[0] * call.q.shape[1]


def attend_by_variant(call: Arguments, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """`triton.attention.attend` by the variant that a tiling names, which may refuse the call."""
    # Imported here because Gluon is an experiment of Triton's that may change.
    module = importlib.import_module(f"{__package__}.{tiling.variant}")
    return module.attend(call, tiling)
