"""Tiles of the 8-bit kernel: how rows become 8 bits, and one step of the softmax over them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_kernel(
    p_x, p_mean, p_values, p_scales, p_shifts, tokens, num_heads, group,
    stride_xb, stride_xh, stride_xn,
    DIM: tl.constexpr, BLOCK: tl.constexpr, IS_QUERY: tl.constexpr,
):  # fmt: skip
    """One block (grid axis 0) of one head (axis 1) in 8 bits, and the scale that undoes it.

    Of keys their mean is taken off first; of queries its product with each is written beside.
    """
    row = tl.program_id(1)
    batch = row // num_heads
    head = row % num_heads
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, DIM)
    is_token = (o_n < tokens)[:, None]
    p_x += batch.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
    p_tile = p_x + o_n.to(tl.int64)[:, None] * stride_xn + o_d[None, :]
    b_x = tl.load(p_tile, mask=is_token, other=0.0).to(tl.float32)
    b_mean = tl.load(p_mean + (batch * (num_heads // group) + head // group) * DIM + o_d)
    first = row.to(tl.int64) * tokens
    if IS_QUERY:
        b_shift = tl.sum(b_x * b_mean[None, :], 1)
        tl.store(p_shifts + first + o_n, b_shift, mask=o_n < tokens)
    else:
        b_x = tl.where(is_token, b_x - b_mean[None, :], 0.0)
    largest = tl.max(tl.max(tl.abs(b_x), 1), 0)
    scale = tl.where(largest == 0.0, 1.0, largest / 127.0)
    b_value = tl.floor(b_x / scale + 0.5).to(tl.int8)
    p_tile = p_values + (first + o_n)[:, None] * DIM + o_d[None, :]
    tl.store(p_tile, b_value, mask=is_token)
    tl.store(p_scales + row * tl.num_programs(0) + tl.program_id(0), scale)


@triton.jit
def attend_int8(
    b_q, b_max, b_sum, b_acc, p_k, p_v, batch, head, first, num_keys, scale_log2,
    TILE: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; `scale_log2` turns products of integers into its units."""
    b_k = p_k.load([batch, head, first, 0]).reshape(TILE, DIM)
    b_s = tl.dot(b_q, tl.trans(b_k)).to(tl.float32)
    if MASKED:
        b_s = tl.where((first + tl.arange(0, TILE) < num_keys)[None, :], b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.math.exp2(b_s * scale_log2 - b_new[:, None])
    b_alpha = tl.math.exp2(b_max - b_new)
    b_v = p_v.load([batch, head, first, 0]).reshape(TILE, DIM)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
    return b_new, b_sum, b_acc
