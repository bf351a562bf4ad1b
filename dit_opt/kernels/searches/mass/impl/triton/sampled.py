"""The mass of blocks by sampled rows on GPUs: the launches of two Triton kernels.

One pass over the keys for each order. It writes, for each row and tile of keys, the logarithm of
the sum of weights, and the row's own log-sum-exp at its end; means over rows then need no other
pass. Keys are gathered as they are read; neither scores nor copies of the keys reach memory.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.impl.triton.arguments import name_broadcast_strides
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import (
    Tiling,
    choose_precision,
    choose_tiling,
    is_amd,
    pad_dim,
)
from dit_opt.kernels.launch import Launch, name_strides, read_architecture
from dit_opt.kernels.scores import LOG2_E
from dit_opt.kernels.searches.mass.impl.triton.kernels import (
    average_rows_kernel,
    sampled_mass_kernel,
)
from dit_opt.kernels.searches.mass.sampled import RowMeans

# Bytes of numbers for rows and tiles that are held at once.
_SHARE_BYTES = 1 << 30

# Rows of a program: twice those of attention halve what is read of the keys from the second-level
# cache. In 16 bits scores alone leave registers for them.
_ROWS = 256

# Of a mean: blocks of keys in a program, and rows that it reads of each at once.
COLUMNS, RUN = 64, 16


def choose_sample_tiling(
    architecture: str, padded_dim: int, itemsize: int, block_k: int, bias: bool
) -> Tiling:
    """Attention's tiling with more rows where they fit, or with a bias the smaller one of unaligned
    loads: gathered keys are loaded through pointers, and so is their bias.

    The number of warps, and of keys in a tile, is one at which ptxas does not spill under either
    Triton: it caps registers a little too low for wide heads on four warps, for the bias and for
    float32 on eight, and for the bias of many keys where products are accumulated by `mma.sync`.
    """
    tiling = choose_tiling(architecture, padded_dim, itemsize, _ROWS, block_k, aligned=not bias)
    if is_amd(architecture):
        return tiling
    if itemsize != 2:
        return dataclasses.replace(tiling, num_warps=4) if padded_dim == 64 else tiling
    if padded_dim > 128:
        return dataclasses.replace(tiling, num_warps=8)
    if bias:
        tile_k = min(tiling.tile_k, 32) if architecture.startswith("sm_8") else tiling.tile_k
        return dataclasses.replace(tiling, num_warps=4, tile_k=tile_k)
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
    lines, key_blocks = batch * heads, ceil_div(k.shape[2], block_k)
    kinds, rows = means.rows.shape
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
    if key_bias is not None:
        key_bias = key_bias.float().contiguous()
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
        **name_broadcast_strides("bias", key_bias),
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
