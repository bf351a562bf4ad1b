"""The Triton kernels of `ditopt::norm_rope_v1`.

A row of a rotary table is as long in bytes as several rows of a head, and heads share it. So a
program takes its tokens through several heads, and programs of the same tokens run side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_opt.kernels.norm_rope.impl.triton.pairs import load_pairs, load_rotation, store_pairs


# Sizes that are not specialised: another length must not compile it again.
@triton.jit(do_not_specialize=["tokens", "heads"])
def measure_rows_kernel(
    p_x, p_rstd, eps, tokens, heads, stride_xb, stride_xn, stride_xh, stride_xd,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """rsqrt(mean(x^2) + eps) over all heads of a tile of tokens (grid axis 0) of an item (1)."""
    batch = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_d = tl.arange(0, PADDED_DIM)
    is_row = o_n < tokens
    is_value = is_row[:, None] & (o_d < DIM)[None, :]
    p_x += batch * stride_xb
    o_x = o_n.to(tl.int64)[:, None] * stride_xn + (o_d * stride_xd)[None, :]
    b_sum = tl.zeros([TILE, PADDED_DIM], tl.float32)
    for _ in tl.range(0, heads):
        b_x = tl.load(p_x + o_x, mask=is_value, other=0.0).to(tl.float32)
        b_sum += b_x * b_x
        p_x += stride_xh
    rstd = tl.math.rsqrt(tl.sum(b_sum, 1) / (heads * DIM) + eps)
    tl.store(p_rstd + batch * tokens + o_n, rstd, mask=is_row)


@triton.jit(
    do_not_specialize=[
        "tokens", "heads", "group", "rope_start", "rope_stop", "stride_rb", "stride_rh"
    ]
)  # fmt: skip
def norm_rope_kernel(
    p_x, p_weight, p_cos, p_sin, p_rows, p_rstd, p_out,
    eps, tokens, heads, group, rope_start, rope_stop,
    stride_xb, stride_xn, stride_xh, stride_xd,
    stride_cn, stride_sn,
    stride_rb, stride_rh, stride_rn,
    stride_ob, stride_oh, stride_on,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACROSS: tl.constexpr, ROPE: tl.constexpr,
    HALVES: tl.constexpr, PER_PAIR: tl.constexpr, HAS_ROWS: tl.constexpr, PER_HEAD: tl.constexpr,
    STRIDE_CD: tl.constexpr, STRIDE_SD: tl.constexpr,
    DIM: tl.constexpr, PADDED_HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of `group` heads (both on grid axis 0, heads first) of an item (axis 1).

    `p_rstd`, float32 [B, N], is read with ACROSS only. Without PER_HEAD all heads have the same
    rows, and the factors of the rotation are loaded once. Their tables are dense or have every
    second channel, never much else, so the strides of the channels are constants: fewer registers.
    """
    groups = tl.cdiv(heads, group)
    first_head = tl.program_id(0) % groups * group
    last_head = tl.minimum(first_head + group, heads)
    batch = tl.program_id(1).to(tl.int64)
    o_n = (tl.program_id(0) // groups * TILE + tl.arange(0, TILE)).to(tl.int64)
    is_row = o_n < tokens
    o_out = o_n * stride_on
    p_x += batch * stride_xb + first_head.to(tl.int64) * stride_xh
    p_out += batch * stride_ob + first_head.to(tl.int64) * stride_oh
    p_rstd += batch * tokens
    # A row of one, so that weights come in the pairs of the values.
    o_zero = tl.arange(0, 1)
    if ACROSS:
        p_weight += first_head * DIM
    elif HAS_WEIGHT:
        w_a, w_b = load_pairs(p_weight, o_zero, o_zero == 0, 1, 0.0, DIM, PADDED_HALF, HALVES)
    if HAS_ROWS:
        p_rows += batch * stride_rb + first_head.to(tl.int64) * stride_rh + o_n * stride_rn
    source = o_n
    if not PER_HEAD:
        if HAS_ROWS:
            source = tl.load(p_rows, mask=is_row, other=0)
        if ROPE:
            cos_a, cos_b, sin_a, sin_b = load_rotation(
                p_cos, p_sin, source, is_row, rope_start, rope_stop,
                stride_cn, stride_sn, STRIDE_CD, STRIDE_SD, DIM, PADDED_HALF, HALVES, PER_PAIR,
            )  # fmt: skip
    for _ in tl.range(first_head, last_head):
        if PER_HEAD:
            source = tl.load(p_rows, mask=is_row, other=0)
            p_rows += stride_rh
            if ROPE:
                cos_a, cos_b, sin_a, sin_b = load_rotation(
                    p_cos, p_sin, source, is_row, rope_start, rope_stop,
                    stride_cn, stride_sn, STRIDE_CD, STRIDE_SD, DIM, PADDED_HALF, HALVES, PER_PAIR,
                )  # fmt: skip
        b_a, b_b = load_pairs(
            p_x, source * stride_xn, is_row, stride_xd, 0.0, DIM, PADDED_HALF, HALVES
        )
        if HAS_NORM:
            if ACROSS:
                rstd = tl.load(p_rstd + source, mask=is_row, other=0.0)
            else:
                rstd = tl.math.rsqrt(tl.sum(b_a * b_a + b_b * b_b, 1) / DIM + eps)
            b_a *= rstd[:, None]
            b_b *= rstd[:, None]
        if HAS_WEIGHT:
            if ACROSS:
                w_a, w_b = load_pairs(
                    p_weight, o_zero, o_zero == 0, 1, 0.0, DIM, PADDED_HALF, HALVES
                )
                p_weight += DIM
            b_a *= w_a
            b_b *= w_b
        if ROPE:
            b_x = b_a
            b_a = b_a * cos_a - b_b * sin_a
            b_b = b_b * cos_b + b_x * sin_b
        store_pairs(p_out, o_out, is_row, b_a, b_b, DIM, PADDED_HALF, HALVES)
        p_x += stride_xh
        p_out += stride_oh
