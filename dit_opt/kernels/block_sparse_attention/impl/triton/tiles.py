"""Tiles of the Triton kernel: how one is loaded, and one step of the online softmax over it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    p_x, batch, head, first, tokens, stride_n, stride_d,
    TILE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[TILE, PADDED_DIM] of one head from token `first` on, zero outside the tensor."""
    if USE_DESCRIPTORS:
        b_x = p_x.load([batch, head, first, 0]).reshape(TILE, PADDED_DIM)
    else:
        o_n = first + tl.arange(0, TILE)
        o_d = tl.arange(0, PADDED_DIM)
        p_tile = p_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
        if MASKED:
            b_x = tl.load(p_tile, mask=(o_n < tokens)[:, None] & (o_d < DIM)[None, :], other=0.0)
        elif DIM != PADDED_DIM:
            b_x = tl.load(p_tile, mask=(o_d < DIM)[None, :], other=0.0)
        else:
            b_x = tl.load(p_tile)
    return b_x


@triton.jit
def weigh_biased(b_s, b_bias, b_max, scale_log2):
    """Weights of biased scores, the new maximum of each row, and what was taken off for it."""
    b_s = b_s * scale_log2 + (b_bias * 1.4426950408889634)[None, :]
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # A bias can leave a row without any key so far, where inf - inf would be NaN.
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = tl.math.exp2(b_s - b_ref[:, None])
    return b_p, b_new, b_ref


@triton.jit
def attend_tile(
    b_q, b_max, b_sum, b_acc, p_k, p_v, p_bias, batch, head, first, num_keys, scale_log2,
    stride_kn, stride_kd, stride_vn, stride_vd,
    TILE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in units of log2 so that the scale folds into one FMA."""
    b_k = load_tile(
        p_k, batch, head, first, num_keys, stride_kn, stride_kd,
        TILE, DIM, PADDED_DIM, USE_DESCRIPTORS, MASKED,
    )  # fmt: skip
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if HAS_BIAS:
        o_k = first + tl.arange(0, TILE)
        if MASKED:
            b_bias = tl.load(p_bias + o_k, mask=o_k < num_keys, other=-float("inf"))
        else:
            b_bias = tl.load(p_bias + o_k)
        b_p, b_new, b_ref = weigh_biased(b_s, b_bias, b_max, scale_log2)
    else:
        if MASKED:
            b_s = tl.where((first + tl.arange(0, TILE) < num_keys)[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_ref = b_new
        b_p = tl.math.exp2(b_s * scale_log2 - b_ref[:, None])
    b_alpha = tl.math.exp2(b_max - b_ref)
    b_v = load_tile(
        p_v, batch, head, first, num_keys, stride_vn, stride_vd,
        TILE, DIM, PADDED_DIM, USE_DESCRIPTORS, MASKED,
    )  # fmt: skip
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc
