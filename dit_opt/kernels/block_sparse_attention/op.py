"""Registers `ditopt::block_sparse_attention_v3` for CPUs and GPUs, and its fake.

One opaque op keeps the graph the same on every device and hides nothing from it: the plan comes in
as data, so CUDA graphs, caches and reordering stay correct.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import (
    Arguments,
    check_arguments,
    new_outputs,
)
from dit_opt.kernels.block_sparse_attention.impl import cpu
from dit_opt.kernels.block_sparse_attention.tail import summarize_blocks

# The version is part of the name because the fake's body is in no compile cache key.
NAME = "block_sparse_attention_v3"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, Tensor? key_bias, "
    "float scale, int block_q, int block_k, Tensor? centroids=None, Tensor? values=None, "
    "Tensor? log_lengths=None, bool with_lse=True) -> (Tensor out, Tensor lse)"
)

torch.library.define(f"ditopt::{NAME}", SCHEMA, tags=(torch.Tag.flexible_layout,))


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    block_q: int = 128,
    block_k: int = 128,
    tail: Literal["drop", "centroid"] = "drop",
) -> tuple[Tensor, Tensor]:
    """Attention in which each block of queries sees only the key blocks of its list.

    Args:
        q: [B, H, Nq, D] in float32, float16 or bfloat16, any strides, D from 1 to 256.
        k, v: [B, Hk, Nk, D], H a multiple of Hk; query head h reads key head h // (H // Hk).
        counts: int32 [B or 1, H, ceil(Nq / block_q)], how many entries of a list are used.
        indices: int32 [B or 1, H, ceil(Nq / block_q), capacity], key blocks, ascending without
            repeats in the used entries; the others are never read.
        key_bias: additive float32 [B or 1, H or 1, Nk]; 0 keeps a key, -inf removes it.
        scale: positive factor on the scores; D ** -0.5 if None.
        block_q, block_k: tokens in a query and in a key block; the last of either may be ragged.
        tail: what stands for the blocks that are not listed: nothing ("drop"), or their mean key
            and mean value, weighted by their length ("centroid", see `tail.Tail`).

    Returns:
        out [B, H, Nq, D], a transposed view of [B, Nq, H, D] memory, and lse, float32 [B, H, Nq],
        the natural logarithm of the softmax denominator, its tail included. Rows without keys
        give 0 and -inf.

    Raises:
        TypeError, ValueError, RuntimeError: see `contract.check_arguments`.
        ValueError: a tail of another name.
    """
    if tail not in ("drop", "centroid"):
        raise ValueError(
            f"block_sparse_attention: tail must be 'drop' or 'centroid', not {tail!r}."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (q, k, v, counts, indices, key_bias, scale, block_q, block_k)
    operator = torch.ops.ditopt.block_sparse_attention_v3
    if tail == "drop":
        return operator(*arguments)
    return operator(*arguments, *summarize_blocks(k, v, key_bias, block_k))


@torch.library.impl(f"ditopt::{NAME}", "CPU")
def _run_on_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Arguments(*arguments)
    check_arguments(call)
    return cpu.attend(call)


@torch.library.impl(f"ditopt::{NAME}", "CUDA")
def _run_on_gpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Imported here because Triton is absent where there is no GPU to run it on.
    from dit_opt.kernels.block_sparse_attention.impl.triton import attention

    call = Arguments(*arguments)
    check_arguments(call)
    out, lse = attention.attend(call)
    return out, lse if call.with_lse else lse.new_empty((*lse.shape[:2], 0))


@torch.library.register_fake(f"ditopt::{NAME}")
def _fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    call = Arguments(*arguments, **named)
    check_arguments(call)
    return new_outputs(call.q, call.with_lse)
