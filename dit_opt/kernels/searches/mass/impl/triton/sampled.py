"""The mass of blocks by sampled rows on GPUs: two Triton kernels and their launches.

One pass over the keys for each order. It writes, for each row and tile of keys, the logarithm of
the sum of weights, and the row's own log-sum-exp at its end; means over rows then need no other
pass. Keys are gathered as they are read; neither scores nor copies of the keys reach memory.
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
from dit_opt.kernels.launch import Launch, name_strides, read_architecture
from dit_opt.kernels.scores import LOG2_E
from dit_opt.kernels.searches.mass.sampled import RowMeans

# Bytes of numbers for rows and tiles that are held at once.
_SHARE_BYTES = 1 << 30

# Rows of a program: twice those of attention halve what is read of the keys from the second-level
# cache. In 16 bits scores alone leave registers for them.
_ROWS = 256

# Of a mean: blocks of keys in a program, and rows that it reads of each at once.
COLUMNS, RUN = 64, 16


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


def choose_sample_tiling(
    architecture: str, padded_dim: int, itemsize: int, block_k: int, bias: bool
) -> Tiling:
    """Attention's tiling with more rows where they fit, or with a bias the smaller one of unaligned
    loads: gathered keys are loaded through pointers, and so is their bias.

    The number of warps is one at which ptxas does not spill under either Triton: it caps registers
    a little too low for wide heads on four warps, and for the bias on eight.
    """
    tiling = choose_tiling(architecture, padded_dim, itemsize, _ROWS, block_k, aligned=not bias)
    if is_amd(architecture) or itemsize != 2:
        return tiling
    if padded_dim > 128:
        return dataclasses.replace(tiling, num_warps=8)
    if bias:
        return dataclasses.replace(tiling, num_warps=4)
    return dataclasses.replace(tiling, tile_q=_ROWS)


def measure_orders(
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
        q: [B, H, Nq, D], any strides.
        k: [B, Hk, Nk, D] of the same dtype, Hk a divisor of H.
        orders: int64 [O, Nk], contiguous.
        means: of the rows that stand for each query block.
        key_bias: additive float32 [B or 1, H or 1, Nk], or None.
        block_k: keys in a block, a power of two of 16 or more.

    Returns float32 [B, H, O, nq, ceil(Nk / block_k)].
    """
    batch, heads = q.shape[:2]
    lines, (kinds, rows), key_blocks = (
        batch * heads,
        means.rows.shape,
        ceil_div(k.shape[2], block_k),
    )
    mass = q.new_empty((lines, kinds, means.first.shape[1], key_blocks), dtype=torch.float32)
    architecture = read_architecture(q.device)
    tiling = _choose_tiling(q, key_bias, block_k, architecture)
    tiles = block_k // tiling.tile_k
    step = min(lines, max(1, _SHARE_BYTES // (4 * kinds * rows * key_blocks * tiles)))
    shares = q.new_empty((step, kinds, key_blocks * tiles, rows), dtype=torch.float32)
    sums = q.new_empty((step, kinds, rows), dtype=torch.float32)
    for first in range(0, lines, step):
        part = slice(first, min(first + step, lines))
        count = part.stop - first
        launch_shares(
            q, k, key_bias, scale, means.rows, orders, block_k, first, shares[:count], sums[:count],
            architecture,
        ).run()  # fmt: skip
        launch_means(shares[:count], sums[:count], means, mass[part]).run()
    return mass.unflatten(0, (batch, heads))


def measure_blocks(
    q: Tensor, k: Tensor, scale: float, block_q: int, block_k: int, key_bias: Tensor | None
) -> Tensor:
    """As `measure_block_mass`: every row, in one order. Raises ValueError for a block_k that tiles
    cannot cover."""
    if block_k < 16 or block_k & (block_k - 1):
        raise ValueError(f"block_k={block_k} must be a power of two, 16 or more.")
    queries = q.shape[2]
    rows = torch.arange(queries, device=q.device)[None]
    first = torch.arange(0, queries, block_q, dtype=torch.int32, device=q.device)[None]
    means = RowMeans(rows, first, (first + block_q).clamp(max=queries))
    orders = torch.arange(k.shape[2], device=q.device)[None]
    return measure_orders(q, k, orders, means, scale, key_bias, block_k).squeeze(2)


def launch_shares(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    rows: Tensor,
    orders: Tensor,
    block_k: int,
    first_head: int,
    shares: Tensor,
    sums: Tensor,
    architecture: str,
) -> Launch:
    """`sampled_mass_kernel` for as many heads of all items, from `first_head` on, as `shares` and
    `sums` have room for."""
    (heads, dim), keys = q.shape[1::2], k.shape[2]
    count, kinds, key_tiles, num_rows = shares.shape
    tiling = _choose_tiling(q, key_bias, block_k, architecture)
    bias_strides = (0, 0)
    if key_bias is not None:
        key_bias = key_bias.float().contiguous()
        bias_strides = tuple(
            stride if size > 1 else 0
            for size, stride in zip(key_bias.shape[:2], key_bias.stride()[:2], strict=True)
        )
    args = {
        "p_q": q,
        "p_k": k,
        # A pointer must be given; it is never read without HAS_BIAS.
        "p_bias": sums if key_bias is None else key_bias,
        "p_rows": rows,
        "p_orders": orders,
        "p_shares": shares,
        "p_sums": sums,
        "first_head": first_head,
        "scale_log2": scale * LOG2_E,
        "num_rows": num_rows,
        "num_keys": keys,
        "num_heads": heads,
        "group": heads // k.shape[1],
        "key_tiles": key_tiles,
        **name_strides("q", "bhnd", q),
        **name_strides("k", "bhnd", k),
        "stride_bias_b": bias_strides[0],
        "stride_bias_h": bias_strides[1],
    }
    padded_dim = pad_dim(dim)
    constexprs = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "TILE_Q": tiling.tile_q,
        "TILE_K": tiling.tile_k,
        "HAS_BIAS": key_bias is not None,
        "RAGGED": keys % block_k != 0,
        "PRECISION": choose_precision(architecture, padded_dim, q.element_size()),
    }
    grid = (ceil_div(num_rows, tiling.tile_q), count, kinds)
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    return Launch(sampled_mass_kernel, grid, args, constexprs, options)


def launch_means(shares: Tensor, sums: Tensor, means: RowMeans, mass: Tensor) -> Launch:
    """`average_rows_kernel` for the heads of `mass` [heads, O, nq, nk]."""
    count, kinds, key_tiles, num_rows = shares.shape
    query_blocks, key_blocks = mass.shape[2:]
    args = {
        "p_shares": shares,
        "p_sums": sums,
        "p_first": means.first,
        "p_last": means.last,
        "p_mass": mass,
        "kinds": kinds,
        "num_rows": num_rows,
        "key_blocks": key_blocks,
    }
    constexprs = {"TILES": key_tiles // key_blocks, "COLUMNS": COLUMNS, "RUN": RUN}
    grid = (query_blocks, ceil_div(key_blocks, COLUMNS), count * kinds)
    return Launch(average_rows_kernel, grid, args, constexprs, {"num_warps": 4})


def _choose_tiling(q: Tensor, key_bias: Tensor | None, block_k: int, architecture: str) -> Tiling:
    padded_dim, itemsize = pad_dim(q.shape[3]), q.element_size()
    return choose_sample_tiling(architecture, padded_dim, itemsize, block_k, key_bias is not None)
