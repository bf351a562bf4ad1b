"""The mass of blocks by sampled rows on GPUs: two Triton kernels and their launcher.

One pass over the keys finds what each sampled row sums to, and one more for every order how much of
that each block of keys holds. Keys are gathered as they are read; neither scores nor copies of the
keys reach memory, only one number for each row and block.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import (
    Tiling,
    choose_precision,
    choose_tiling,
    is_amd,
    pad_dim,
)
from dit_opt.kernels.launch import read_architecture
from dit_opt.kernels.own_device import on_own_device
from dit_opt.kernels.routers.sampled_mass import RowMeans
from dit_opt.kernels.routers.score_tiles_triton import score_tile, sum_rows
from dit_opt.kernels.scores import LOG2_E

# Bytes of numbers for rows and blocks that are held at once.
_MASS_BYTES = 1 << 30

# Rows of a program: keys that are read from the second-level cache serve so many, which halves what
# 128 would read of it. Scores alone leave registers for them in 16 bits.
_ROWS = 256

# Of a mean: blocks of keys that a program takes, and rows that it reads of each at once.
COLUMNS, RUN = 64, 16


@triton.jit
def _load_rows(
    p_q, o_q, is_row, stride_n, stride_d, DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):  # fmt: skip
    o_d = tl.arange(0, PADDED_DIM)
    p_tile = p_q + o_q[:, None] * stride_n + o_d[None, :] * stride_d
    return tl.load(p_tile, mask=is_row[:, None] & (o_d < DIM)[None, :], other=0.0)


@triton.jit
def row_sums_kernel(
    p_q, p_k, p_bias, p_rows, p_lse,
    scale_log2, num_rows, num_keys, num_heads, group,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bias_b, stride_bias_h,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp, in units of log2, of a tile of sampled rows (grid axis 0) of one head (axis
    1), put where the query of each row stands; 0 for rows without any key."""
    row = tl.program_id(1)
    batch = row // num_heads
    head = row % num_heads
    p_q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    p_k += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    if HAS_BIAS:
        p_bias += batch.to(tl.int64) * stride_bias_b + head.to(tl.int64) * stride_bias_h
    o_row = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    is_row = o_row < num_rows
    o_q = tl.load(p_rows + o_row, mask=is_row, other=0)
    b_q = _load_rows(p_q, o_q, is_row, stride_qn, stride_qd, DIM, PADDED_DIM)
    b_lse = sum_rows(
        b_q, p_k, p_bias, num_keys, scale_log2, stride_kn, stride_kd,
        TILE_Q, TILE_K, DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
    )  # fmt: skip
    tl.store(p_lse + row.to(tl.int64) * num_keys + o_q, b_lse, mask=is_row)


@triton.jit
def _write_tile(
    b_q, b_lse, p_k, p_bias, p_order, p_mass, o_row, is_row, tile, num_keys, scale_log2,
    stride_n, stride_d,
    TILE_K: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gather a tile of keys and write what it holds of the softmax of each row."""
    o_place = tile * TILE_K + tl.arange(0, TILE_K)
    is_key = o_place < num_keys
    if RAGGED:
        o_k = tl.load(p_order + o_place, mask=is_key, other=0)
    else:
        o_k = tl.load(p_order + o_place)
    b_s = score_tile(
        b_q, p_k, p_bias, o_k, is_key, scale_log2, stride_n, stride_d,
        DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
    )  # fmt: skip
    b_mass = tl.sum(tl.math.exp2(b_s - b_lse[:, None]), 1)
    tl.store(p_mass + o_row, b_mass, mask=is_row)


@triton.jit(do_not_specialize=["first_head"])
def sampled_mass_kernel(
    p_q, p_k, p_bias, p_rows, p_orders, p_lse, p_mass,
    first_head, scale_log2, num_rows, num_keys, num_heads, group, key_tiles,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bias_b, stride_bias_h,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share that every tile of keys in one order (grid axis 2) has of the softmax of a tile of
    sampled rows (axis 0) of one head (axis 1, from `first_head` on): [heads, O, tiles, rows].

    Rows stand in the order, too, so that those of a query block are neighbours in memory.
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
    b_q = _load_rows(p_q, o_q, is_row, stride_qn, stride_qd, DIM, PADDED_DIM)
    b_lse = tl.load(p_lse + row.to(tl.int64) * num_keys + o_q, mask=is_row, other=0.0)
    p_orders += order * num_keys
    p_mass += (tl.program_id(1) * tl.num_programs(2) + order) * key_tiles * num_rows
    full = num_keys // TILE_K
    for tile in tl.range(0, full):
        _write_tile(
            b_q, b_lse, p_k, p_bias, p_orders, p_mass, o_row, is_row, tile, num_keys, scale_log2,
            stride_kn, stride_kd,
            TILE_K, DIM, PADDED_DIM, HAS_BIAS, False, PRECISION,
        )  # fmt: skip
        p_mass += num_rows
    if RAGGED:
        for tile in tl.range(full, key_tiles, num_stages=1):
            _write_tile(
                b_q, b_lse, p_k, p_bias, p_orders, p_mass, o_row, is_row, tile, num_keys,
                scale_log2, stride_kn, stride_kd,
                TILE_K, DIM, PADDED_DIM, HAS_BIAS, True, PRECISION,
            )  # fmt: skip
            p_mass += num_rows


@triton.jit
def average_rows_kernel(
    p_shares, p_first, p_last, p_mass, kinds, num_rows, key_blocks,
    TILES: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The mean over the rows of one query block (grid axis 0) of what some blocks of keys (axis 1)
    hold, in one order of one head (axis 2): [heads, O, tiles, rows] to [heads, O, nq, nk]."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    line, order = tl.program_id(2).to(tl.int64), tl.program_id(2) % kinds
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = o_column < key_blocks
    first = tl.load(p_first + order * blocks + block)
    last = tl.load(p_last + order * blocks + block)
    p_shares += line * key_blocks * TILES * num_rows
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(first, last, RUN):
        o_row = start + tl.arange(0, RUN)
        mask = is_column[:, None] & (o_row < last)[None, :]
        for part in tl.static_range(TILES):
            o_tile = (o_column * TILES + part).to(tl.int64)
            p_tile = p_shares + o_tile[:, None] * num_rows + o_row[None, :]
            b_sum += tl.sum(tl.load(p_tile, mask=mask, other=0.0), 1)
    p_mass += (line * blocks + block) * key_blocks
    tl.store(p_mass + o_column, b_sum / (last - first), mask=is_column)


def choose_sample_tiling(
    architecture: str, padded_dim: int, itemsize: int, block_k: int, bias: bool
) -> Tiling:
    """Attention's tiling with more rows where they fit, or with a bias the smaller one of unaligned
    loads: keys that are gathered are loaded through pointers, and so is their bias.

    Warps are as many as leave ptxas no reason to spill with either Triton: it holds the wide heads
    of four warps, and the bias of eight, to a step of registers that is a few too small.
    """
    tiling = choose_tiling(architecture, padded_dim, itemsize, _ROWS, block_k, aligned=not bias)
    if is_amd(architecture) or itemsize != 2:
        return tiling
    if padded_dim > 128:
        return dataclasses.replace(tiling, num_warps=8)
    if bias:
        return dataclasses.replace(tiling, num_warps=4)
    return dataclasses.replace(tiling, tile_q=_ROWS)


@on_own_device
def launch(
    q: Tensor,
    k: Tensor,
    orders: Tensor,
    means: RowMeans,
    scale: float,
    key_bias: Tensor | None,
    block_k: int,
) -> Tensor:
    """The softmax mass of every block of keys in each order, as means over sampled rows.

    A row without any key has none. Runs on the device of `q`, or on CPU tensors under
    TRITON_INTERPRET=1.

    Args:
        q: [B, H, N, D], any strides.
        k: [B, Hk, N, D] of the same dtype, Hk a divisor of H.
        orders: int64 [O, N], contiguous.
        means: of the rows that stand for each query block.
        key_bias: additive float32 [B or 1, H or 1, N], or None.
        block_k: keys in a block, a power of two of 16 or more.

    Returns float32 [B, H, O, nq, ceil(N / block_k)].
    """
    batch, heads, _, dim = q.shape
    keys, (kinds, rows), query_blocks = k.shape[2], means.rows.shape, means.first.shape[1]
    architecture = read_architecture(q.device)
    padded_dim = pad_dim(dim)
    tiling = choose_sample_tiling(
        architecture, padded_dim, q.element_size(), block_k, key_bias is not None
    )
    key_blocks, tiles = ceil_div(keys, block_k), block_k // tiling.tile_k
    row_tiles = ceil_div(rows, tiling.tile_q)
    bias_strides = (0, 0)
    if key_bias is not None:
        key_bias = key_bias.float().contiguous()
        bias_strides = tuple(
            stride if size > 1 else 0
            for size, stride in zip(key_bias.shape[:2], key_bias.stride()[:2], strict=True)
        )
    lse = q.new_empty((batch * heads, keys), dtype=torch.float32)
    # A pointer must be given; it is never read without HAS_BIAS.
    tensors = (q, k, lse if key_bias is None else key_bias, means.rows)
    sizes = (scale * LOG2_E, rows, keys, heads, heads // k.shape[1])
    strides = (*q.stride(), *k.stride(), *bias_strides)
    options = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "TILE_Q": tiling.tile_q,
        "TILE_K": tiling.tile_k,
        "HAS_BIAS": key_bias is not None,
        "RAGGED": keys % block_k != 0,
        "PRECISION": choose_precision(architecture, padded_dim, q.element_size()),
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }
    row_sums_kernel[row_tiles, batch * heads](*tensors, lse, *sizes, *strides, **options)

    mass = q.new_empty((batch * heads, kinds, query_blocks, key_blocks), dtype=torch.float32)
    step = min(batch * heads, max(1, _MASS_BYTES // (4 * kinds * rows * key_blocks * tiles)))
    shares = q.new_empty((step, kinds, key_blocks * tiles, rows), dtype=torch.float32)
    for first in range(0, batch * heads, step):
        count = min(step, batch * heads - first)
        sampled_mass_kernel[row_tiles, count, kinds](
            *tensors, orders, lse, shares, first, *sizes, key_blocks * tiles, *strides, **options
        )
        average_rows_kernel[query_blocks, ceil_div(key_blocks, COLUMNS), count * kinds](
            shares,
            means.first,
            means.last,
            mass[first],
            kinds,
            rows,
            key_blocks,
            TILES=tiles,
            COLUMNS=COLUMNS,
            RUN=RUN,
            num_warps=4,
        )
    return mass.unflatten(0, (batch, heads))
