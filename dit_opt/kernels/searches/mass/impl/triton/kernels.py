"""The Triton kernels of sampled mass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _score_tile(
    b_q, p_k, p_bias, o_k, is_key, scale_log2, stride_n, stride_d,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries against the keys `o_k`, in units of log2; where RAGGED, -inf
    without `is_key`."""
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
    b_q, b_max, b_sum, p_k, p_bias, p_order, p_shares, o_row, is_row, tile, num_keys,
    scale_log2, stride_n, stride_d,
    TILE_K: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gather a tile of keys, write the log2 of each row's sum of weights in it, and add it to the
    row's greatest score and sum."""
    o_place = tile * TILE_K + tl.arange(0, TILE_K)
    is_key = o_place < num_keys
    if RAGGED:
        o_k = tl.load(p_order + o_place, mask=is_key, other=0)
    else:
        o_k = tl.load(p_order + o_place)
    b_s = _score_tile(
        b_q, p_k, p_bias, o_k, is_key, scale_log2, stride_n, stride_d,
        DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
    )  # fmt: skip
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # Rows without any key so far, where inf - inf would be NaN.
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_part = tl.sum(tl.math.exp2(b_s - b_ref[:, None]), 1)
    tl.store(p_shares + o_row, b_ref + tl.math.log2(b_part), mask=is_row)
    return b_new, b_sum * tl.math.exp2(b_max - b_ref) + b_part


@triton.jit(do_not_specialize=["first_head"])
def sampled_mass_kernel(
    p_q, p_k, p_bias, p_rows, p_orders, p_shares, p_sums,
    first_head, scale_log2, num_rows, num_keys, num_heads, group, key_tiles,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bias_b, stride_bias_h,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The log2 of the sum of weights of every tile of keys in one order (grid axis 2), for a tile
    of sampled rows (axis 0) of one head (axis 1, from `first_head` on): `p_shares` [heads, O,
    tiles, rows]; and that of all keys, `p_sums` [heads, O, rows], 0 for rows without any key.

    Rows are sorted by the order, too, so that those of a query block are neighbours in memory.
    """
    row = first_head + tl.program_id(1)
    batch = row // num_heads
    head = row % num_heads
    p_q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    p_k += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    if HAS_BIAS:
        p_bias += batch.to(tl.int64) * stride_bias_b + head.to(tl.int64) * stride_bias_h
    o_row = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    is_row = o_row < num_rows
    order = tl.program_id(2).to(tl.int64)
    o_q = tl.load(p_rows + order * num_rows + o_row, mask=is_row, other=0)
    o_d = tl.arange(0, PADDED_DIM)
    p_tile = p_q + o_q[:, None] * stride_qn + o_d[None, :] * stride_qd
    b_q = tl.load(p_tile, mask=is_row[:, None] & (o_d < DIM)[None, :], other=0.0)
    line = tl.program_id(1) * tl.num_programs(2) + order
    p_orders += order * num_keys
    p_shares += line * key_tiles * num_rows
    b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q], tl.float32)
    # Only the last tiles may be ragged: masks would cost all others a third of their time.
    full = num_keys // TILE_K
    for tile in tl.range(0, full):
        b_max, b_sum = _add_tile(
            b_q, b_max, b_sum, p_k, p_bias, p_orders, p_shares, o_row, is_row, tile, num_keys,
            scale_log2, stride_kn, stride_kd,
            TILE_K, DIM, PADDED_DIM, HAS_BIAS, False, PRECISION,
        )  # fmt: skip
        p_shares += num_rows
    if RAGGED:
        for tile in tl.range(full, key_tiles, num_stages=1):
            b_max, b_sum = _add_tile(
                b_q, b_max, b_sum, p_k, p_bias, p_orders, p_shares, o_row, is_row, tile, num_keys,
                scale_log2, stride_kn, stride_kd,
                TILE_K, DIM, PADDED_DIM, HAS_BIAS, True, PRECISION,
            )  # fmt: skip
            p_shares += num_rows
    b_total = tl.where(b_sum > 0.0, b_max + tl.math.log2(b_sum), 0.0)
    tl.store(p_sums + line * num_rows + o_row, b_total, mask=is_row)


@triton.jit
def average_rows_kernel(
    p_shares, p_sums, p_first, p_last, p_mass, kinds, num_rows, key_blocks,
    TILES: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The mean over the rows of one query block (grid axis 0) of their softmax mass in some blocks
    of keys (axis 1), in one order of one head (axis 2): `p_mass` [heads, O, nq, nk]."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    line, order = tl.program_id(2).to(tl.int64), tl.program_id(2) % kinds
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = o_column < key_blocks
    first = tl.load(p_first + order * blocks + block)
    last = tl.load(p_last + order * blocks + block)
    p_shares += line * key_blocks * TILES * num_rows
    p_sums += line * num_rows
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(first, last, RUN):
        o_row = start + tl.arange(0, RUN)
        b_total = tl.load(p_sums + o_row, mask=o_row < last, other=0.0)
        mask = is_column[:, None] & (o_row < last)[None, :]
        for part in tl.static_range(TILES):
            o_tile = (o_column * TILES + part).to(tl.int64)
            p_tile = p_shares + o_tile[:, None] * num_rows + o_row[None, :]
            b_share = tl.load(p_tile, mask=mask, other=-float("inf"))
            b_sum += tl.sum(tl.math.exp2(b_share - b_total[None, :]), 1)
    p_mass += (line * blocks + block) * key_blocks
    tl.store(p_mass + o_column, b_sum / (last - first), mask=is_column)
