"""Pairs of channels for the Triton kernels: rows as two tiles, and the factors that rotate them.

Each member of the pairs gets a tile of its own, padded on its own, so that a head dimension that is
no power of two has its halves where the tiles have them.
"""

# Triton annotates a call of one kernel by another as one that never returns.
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pairs(
    p, o_r, is_row, stride_d,
    OTHER: tl.constexpr, DIM: tl.constexpr, PADDED_HALF: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Both members of the pairs of channels of rows, each float32 [ROWS, PADDED_HALF].

    The rows begin at the offsets `o_r` [ROWS]; `OTHER` stands for what is masked and for padding.
    """
    if HALVES:
        o_h = tl.arange(0, PADDED_HALF)
        is_value = is_row[:, None] & (o_h < DIM // 2)[None, :]
        p_a = p + o_r[:, None] + (o_h * stride_d)[None, :]
        b_a = tl.load(p_a, mask=is_value, other=OTHER)
        b_b = tl.load(p_a + DIM // 2 * stride_d, mask=is_value, other=OTHER)
    else:
        # In one piece, because neighbours that are loaded apart make no wide loads.
        o_d = tl.arange(0, 2 * PADDED_HALF)
        is_value = is_row[:, None] & (o_d < DIM)[None, :]
        b_x = tl.load(p + o_r[:, None] + (o_d * stride_d)[None, :], mask=is_value, other=OTHER)
        b_a, b_b = tl.split(tl.reshape(b_x, [o_r.shape[0], PADDED_HALF, 2]))
    return b_a.to(tl.float32), b_b.to(tl.float32)


@triton.jit
def store_pairs(
    p, o_r, is_row, b_a, b_b, DIM: tl.constexpr, PADDED_HALF: tl.constexpr, HALVES: tl.constexpr
):
    """The inverse of `load_pairs`, into rows of contiguous channels."""
    b_a = b_a.to(p.dtype.element_ty)
    b_b = b_b.to(p.dtype.element_ty)
    if HALVES:
        o_h = tl.arange(0, PADDED_HALF)
        is_value = is_row[:, None] & (o_h < DIM // 2)[None, :]
        p_a = p + o_r[:, None] + o_h[None, :]
        tl.store(p_a, b_a, mask=is_value)
        tl.store(p_a + DIM // 2, b_b, mask=is_value)
    else:
        o_d = tl.arange(0, 2 * PADDED_HALF)
        is_value = is_row[:, None] & (o_d < DIM)[None, :]
        b_x = tl.reshape(tl.join(b_a, b_b), [o_r.shape[0], 2 * PADDED_HALF])
        tl.store(p + o_r[:, None] + o_d[None, :], b_x, mask=is_value)


@triton.jit
def _load_factors(
    p, o_r, is_row, stride_d,
    OTHER: tl.constexpr, DIM: tl.constexpr, PADDED_HALF: tl.constexpr, HALVES: tl.constexpr,
    PER_PAIR: tl.constexpr,
):  # fmt: skip
    """As `load_pairs`, of a rotary table that may have one factor for each pair."""
    if PER_PAIR:
        o_h = tl.arange(0, PADDED_HALF)
        is_value = is_row[:, None] & (o_h < DIM // 2)[None, :]
        b_f = tl.load(p + o_r[:, None] + (o_h * stride_d)[None, :], mask=is_value, other=OTHER)
        b_a = b_f.to(tl.float32)
        b_b = b_a
    else:
        b_a, b_b = load_pairs(p, o_r, is_row, stride_d, OTHER, DIM, PADDED_HALF, HALVES)
    return b_a, b_b


@triton.jit
def load_rotation(
    p_cos, p_sin, source, is_row, rope_start, rope_stop, stride_cn, stride_sn,
    STRIDE_CD: tl.constexpr, STRIDE_SD: tl.constexpr,
    DIM: tl.constexpr, PADDED_HALF: tl.constexpr, HALVES: tl.constexpr, PER_PAIR: tl.constexpr,
):  # fmt: skip
    """cos_a, cos_b, sin_a and sin_b of the tokens `source`; 1 and 0 for those not rotated."""
    is_rotated = is_row & (source >= rope_start) & (source < rope_stop)
    o_m = source - rope_start
    cos_a, cos_b = _load_factors(
        p_cos, o_m * stride_cn, is_rotated, STRIDE_CD, 1.0, DIM, PADDED_HALF, HALVES, PER_PAIR
    )
    sin_a, sin_b = _load_factors(
        p_sin, o_m * stride_sn, is_rotated, STRIDE_SD, 0.0, DIM, PADDED_HALF, HALVES, PER_PAIR
    )
    return cos_a, cos_b, sin_a, sin_b
