"""The mass of blocks by sampled rows on GPUs: two Triton kernels and their launcher.

One pass over the keys finds what each sampled row sums to, and one more for every order how much of
that each block of keys holds. Keys are gathered as they are read; neither scores nor copies of the
keys reach memory, only one number for each row and block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.tilings import (
    Tiling,
    choose_precision,
    choose_tiling,
    pad_dim,
)
from dit_opt.kernels.block_sparse_attention.triton import read_architecture
from dit_opt.kernels.routers.sampled_mass import RowMeans
from dit_opt.kernels.routers.score_tiles_triton import score_tile, sum_rows
from dit_opt.kernels.scores import LOG2_E

# Bytes of numbers for rows and blocks that are held at once.
_MASS_BYTES = 1 << 30

# Rows that a program would like to have; how many it gets, the tiling says.
_ROWS = 128


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
    1); 0 for rows without any key."""
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
    o_d = tl.arange(0, PADDED_DIM)
    p_tile = p_q + o_q[:, None] * stride_qn + o_d[None, :] * stride_qd
    b_q = tl.load(p_tile, mask=is_row[:, None] & (o_d < DIM)[None, :], other=0.0)
    b_lse = sum_rows(
        b_q, p_k, p_bias, num_keys, scale_log2, stride_kn, stride_kd,
        TILE_Q, TILE_K, DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
    )  # fmt: skip
    tl.store(p_lse + row.to(tl.int64) * num_rows + o_row, b_lse, mask=is_row)


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
    sampled rows (axis 0) of one head (axis 1, from `first_head` on).

    Rows stand one below the other, so that their means are sums of whole lines of memory. A program
    writes a line from its start to its end: it waits in the cache until it is full.
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
    o_q = tl.load(p_rows + o_row, mask=is_row, other=0)
    o_d = tl.arange(0, PADDED_DIM)
    p_tile = p_q + o_q[:, None] * stride_qn + o_d[None, :] * stride_qd
    b_q = tl.load(p_tile, mask=is_row[:, None] & (o_d < DIM)[None, :], other=0.0)
    b_lse = tl.load(p_lse + row.to(tl.int64) * num_rows + o_row, mask=is_row, other=0.0)
    p_orders += tl.program_id(2).to(tl.int64) * num_keys
    line = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * num_rows
    p_mass += (line + o_row) * key_tiles
    for tile in tl.range(0, key_tiles):
        o_place = tile * TILE_K + tl.arange(0, TILE_K)
        is_key = o_place < num_keys
        o_k = tl.load(p_orders + o_place, mask=is_key, other=0)
        b_s = score_tile(
            b_q, p_k, p_bias, o_k, is_key, scale_log2, stride_kn, stride_kd,
            DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
        )  # fmt: skip
        b_mass = tl.sum(tl.math.exp2(b_s - b_lse[:, None]), 1)
        tl.store(p_mass + tile, b_mass, mask=is_row)


def choose_sample_tiling(
    architecture: str, padded_dim: int, itemsize: int, block_k: int, bias: bool
) -> Tiling:
    """Attention's tiling, or with a bias the smaller one of unaligned loads: keys that are gathered
    are loaded through pointers, and so is their bias."""
    return choose_tiling(architecture, padded_dim, itemsize, _ROWS, block_k, aligned=not bias)


def launch(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
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
        rows: int64 [m], which queries are sampled.
        orders: int64 [O, N], contiguous.
        means: O * nq means over the sampled rows.
        key_bias: additive float32 [B or 1, H or 1, N], or None.
        block_k: keys in a block, a power of two of 16 or more.

    Returns float32 [B, H, O, nq, ceil(N / block_k)].
    """
    batch, heads, _, dim = q.shape
    keys, kinds = k.shape[2], len(orders)
    architecture = read_architecture(q.device)
    padded_dim = pad_dim(dim)
    tiling = choose_sample_tiling(
        architecture, padded_dim, q.element_size(), block_k, key_bias is not None
    )
    tiles = block_k // tiling.tile_k
    key_tiles = ceil_div(keys, block_k) * tiles
    row_tiles = ceil_div(len(rows), tiling.tile_q)
    bias_strides = (0, 0)
    if key_bias is not None:
        key_bias = key_bias.float().contiguous()
        bias_strides = tuple(
            stride if size > 1 else 0
            for size, stride in zip(key_bias.shape[:2], key_bias.stride()[:2], strict=True)
        )
    lse = q.new_empty((batch * heads, len(rows)), dtype=torch.float32)
    # A pointer must be given; it is never read without HAS_BIAS.
    tensors = (q, k, lse if key_bias is None else key_bias, rows)
    sizes = (scale * LOG2_E, len(rows), keys, heads, heads // k.shape[1])
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

    step = max(1, _MASS_BYTES // (4 * kinds * len(rows) * key_tiles))
    parts = []
    for first in range(0, batch * heads, step):
        count = min(step, batch * heads - first)
        lines = q.new_empty((count * kinds * len(rows), key_tiles), dtype=torch.float32)
        sampled_mass_kernel[row_tiles, count, kinds](
            *tensors, orders, lse, lines, first, *sizes, key_tiles, *strides, **options
        )
        parts.append(_average(lines, means, count, kinds))
    mass = parts[0] if len(parts) == 1 else torch.cat(parts)
    if tiles > 1:
        mass = mass.unflatten(-1, (-1, tiles)).sum(-1)
    return mass.unflatten(0, (batch, heads, kinds, -1))


def _average(lines: Tensor, means: RowMeans, count: int, kinds: int) -> Tensor:
    """The means [count * means, columns] over lines [count * kinds * rows, columns]."""
    number = torch.arange(count, device=lines.device)[:, None]
    rows = len(lines) // count
    gather = means.gather + number * rows
    offsets = means.offsets + number * len(means.gather)
    shares = means.shares.repeat(count)
    return torch.embedding_bag(
        lines, gather.flatten(), offsets.flatten(), mode=0, per_sample_weights=shares
    )[0]
