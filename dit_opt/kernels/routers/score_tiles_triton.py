"""What the mass kernels of GPUs share: scores of a tile of keys, and sums over rows of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score_tile(
    b_q, p_k, p_bias, o_k, is_key, scale_log2, stride_n, stride_d,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries against the keys `o_k`, in units of log2; where RAGGED, -inf for
    what `is_key` says is none."""
    o_d = tl.arange(0, PADDED_DIM)
    p_tile = p_k + o_k.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
    if RAGGED:
        b_k = tl.load(p_tile, mask=is_key[:, None] & (o_d < DIM)[None, :], other=0.0)
    else:
        b_k = tl.load(p_tile, mask=(o_d < DIM)[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if HAS_BIAS:
        if RAGGED:
            b_bias = tl.load(p_bias + o_k, mask=is_key, other=0.0)
        else:
            b_bias = tl.load(p_bias + o_k)
        b_s += (b_bias * 1.4426950408889634)[None, :]
    if RAGGED:
        b_s = tl.where(is_key[None, :], b_s, -float("inf"))
    return b_s


@triton.jit
def _add_tile(
    b_q, b_max, b_sum, p_k, p_bias, first, num_keys, scale_log2, stride_n, stride_d,
    TILE_K: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Greatest scores and sums of weights, with a tile of keys more."""
    o_k = first + tl.arange(0, TILE_K)
    b_s = score_tile(
        b_q, p_k, p_bias, o_k, o_k < num_keys, scale_log2, stride_n, stride_d,
        DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
    )  # fmt: skip
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # Rows without any key so far, where inf - inf would be NaN.
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_sum = b_sum * tl.math.exp2(b_max - b_ref) + tl.sum(tl.math.exp2(b_s - b_ref[:, None]), 1)
    return b_new, b_sum


@triton.jit
def sum_rows(
    b_q, p_k, p_bias, num_keys, scale_log2, stride_n, stride_d,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a tile of queries over all keys, in units of log2; 0 for rows without any
    key."""
    b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q], tl.float32)
    # Only the last tile may be ragged: masks would cost all others a third of their time.
    full = num_keys // TILE_K * TILE_K
    for first in tl.range(0, full, TILE_K):
        b_max, b_sum = _add_tile(
            b_q, b_max, b_sum, p_k, p_bias, first, num_keys, scale_log2, stride_n, stride_d,
            TILE_K, DIM, PADDED_DIM, HAS_BIAS, False, PRECISION,
        )  # fmt: skip
    if RAGGED:
        for first in tl.range(full, num_keys, TILE_K, num_stages=1):
            b_max, b_sum = _add_tile(
                b_q, b_max, b_sum, p_k, p_bias, first, num_keys, scale_log2, stride_n, stride_d,
                TILE_K, DIM, PADDED_DIM, HAS_BIAS, True, PRECISION,
            )  # fmt: skip
    return tl.where(b_sum > 0.0, b_max + tl.math.log2(b_sum), 0.0)
