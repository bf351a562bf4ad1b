"""The exact block mass on GPUs: one Triton kernel and its launcher.

Two passes over the keys without a cached log-sum-exp, one with it; the score matrix never leaves
the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import (
    Tiling,
    choose_precision,
    choose_tiling,
    pad_dim,
)
from dit_opt.kernels.launch import read_architecture
from dit_opt.kernels.own_device import on_own_device
from dit_opt.kernels.routers.block_mass import STALE_LIMIT
from dit_opt.kernels.routers.score_tiles_triton import score_tile, sum_rows
from dit_opt.kernels.scores import LOG2_E

# Rows that a tile may have whatever the block, so that products keep the tensor cores busy.
_LEAST_ROWS = 128


@triton.jit
def block_mass_kernel(
    p_q, p_k, p_bias, p_cached, p_mass, p_lse,
    scale_log2, num_queries, num_keys, num_heads, group, key_tiles,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bias_b, stride_bias_h,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, RAGGED: tl.constexpr,
    STALE_LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one query tile (grid axis 0) of one head (axis 1) adds to the mass of its block, or of
    all the small blocks that it holds.

    Every tile of queries and keys writes numbers of its own, which the launcher adds up by blocks:
    an atomic sum would change from run to run, and a sum within would unroll the loop.
    """
    BLOCKS: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q
    first_query = tl.program_id(0) * TILE_Q
    row = tl.program_id(1)
    batch = row // num_heads
    head = row % num_heads
    p_q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    p_k += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    if HAS_BIAS:
        p_bias += batch.to(tl.int64) * stride_bias_b + head.to(tl.int64) * stride_bias_h
    o_q = first_query + tl.arange(0, TILE_Q)
    o_d = tl.arange(0, PADDED_DIM)
    is_query = o_q < num_queries
    p_tile = p_q + o_q.to(tl.int64)[:, None] * stride_qn + o_d[None, :] * stride_qd
    b_q = tl.load(p_tile, mask=is_query[:, None] & (o_d < DIM)[None, :], other=0.0)

    o_lse = row.to(tl.int64) * num_queries + o_q
    if HAS_LSE:
        b_lse = tl.load(p_cached + o_lse, mask=is_query, other=0.0) * 1.4426950408889634
        b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)
    else:
        b_lse = sum_rows(
            b_q, p_k, p_bias, num_keys, scale_log2, stride_kn, stride_kd,
            TILE_Q, TILE_K, DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
        )  # fmt: skip

    o_block = tl.arange(0, BLOCKS)
    b_rows = tl.minimum(num_queries - (first_query // BLOCK_Q + o_block) * BLOCK_Q, BLOCK_Q)
    b_rows = tl.maximum(b_rows, 1).to(tl.float32)
    line = (row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * BLOCKS
    p_mass += (line + o_block) * key_tiles
    b_total = tl.zeros([TILE_Q], tl.float32)
    # Not peeled as the loop over sums is: Blackwell's compiler spills with four products.
    for tile in tl.range(0, key_tiles):
        o_k = tile * TILE_K + tl.arange(0, TILE_K)
        b_s = score_tile(
            b_q, p_k, p_bias, o_k, o_k < num_keys, scale_log2, stride_kn, stride_kd,
            DIM, PADDED_DIM, HAS_BIAS, RAGGED, PRECISION,
        )  # fmt: skip
        b_s -= b_lse[:, None]
        if HAS_LSE:
            b_s = tl.minimum(b_s, STALE_LIMIT)
        b_row = tl.sum(tl.math.exp2(b_s), 1)
        b_total += b_row
        b_tile = tl.reshape(tl.where(is_query, b_row, 0.0), [BLOCKS, TILE_Q // BLOCKS])
        tl.store(p_mass + tile, tl.sum(b_tile, 1) / b_rows)
    b_lse = (b_lse + tl.math.log2(b_total)) * 0.6931471805599453
    tl.store(p_lse + o_lse, tl.where(b_total > 0.0, b_lse, -float("inf")), mask=is_query)


def choose_mass_tiling(
    architecture: str, padded_dim: int, itemsize: int, block_q: int, block_k: int, crowded: bool
) -> Tiling:
    """Attention's tiling, or with both a bias and a cached log-sum-exp (`crowded`) the smaller one
    that attention takes for unaligned loads: the other would spill. Blocks of few queries, as of
    sampled rows, share a tile."""
    rows = max(block_q, _LEAST_ROWS)
    return choose_tiling(architecture, padded_dim, itemsize, rows, block_k, aligned=not crowded)


@on_own_device
def launch(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `block_mass.measure_plainly`; blocks are powers of two.

    Runs on the device of `q`, or on CPU tensors under TRITON_INTERPRET=1. Raises ValueError for
    blocks that tiles cannot cover.
    """
    if any(block & (block - 1) for block in (block_q, block_k)) or block_k < 16:
        raise ValueError(
            f"block_q={block_q} and block_k={block_k} must be powers of two, block_k 16 or more."
        )
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    architecture = read_architecture(q.device)
    padded_dim = pad_dim(dim)
    tiling = choose_mass_tiling(
        architecture,
        padded_dim,
        q.element_size(),
        block_q,
        block_k,
        key_bias is not None and lse is not None,
    )
    tiles_q, tiles_k = ceil_div(block_q, tiling.tile_q), block_k // tiling.tile_k
    grid = (ceil_div(queries, max(block_q, tiling.tile_q)) * tiles_q, batch * heads)
    key_tiles = ceil_div(keys, block_k) * tiles_k
    lines = grid[0] * ceil_div(tiling.tile_q, block_q)
    mass = q.new_empty((batch, heads, lines, key_tiles), dtype=torch.float32)
    found = q.new_empty((batch, heads, queries), dtype=torch.float32)
    bias_strides = (0, 0)
    if key_bias is not None:
        key_bias = key_bias.contiguous()
        bias_strides = tuple(
            stride if size > 1 else 0
            for size, stride in zip(key_bias.shape[:2], key_bias.stride()[:2], strict=True)
        )
    block_mass_kernel[grid](
        q,
        k,
        # Pointers must be given; they are never read without HAS_BIAS and HAS_LSE.
        found if key_bias is None else key_bias,
        found if lse is None else lse.contiguous(),
        mass,
        found,
        scale * LOG2_E,
        queries,
        keys,
        heads,
        heads // k.shape[1],
        key_tiles,
        *q.stride(),
        *k.stride(),
        *bias_strides,
        DIM=dim,
        PADDED_DIM=padded_dim,
        BLOCK_Q=block_q,
        TILE_Q=tiling.tile_q,
        TILE_K=tiling.tile_k,
        HAS_BIAS=key_bias is not None,
        HAS_LSE=lse is not None,
        RAGGED=keys % block_k != 0,
        STALE_LIMIT=STALE_LIMIT,
        PRECISION=choose_precision(architecture, padded_dim, q.element_size()),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if tiles_q * tiles_k > 1:
        mass = mass.unflatten(3, (-1, tiles_k)).unflatten(2, (-1, tiles_q)).sum((3, 5))
    # the last tile may hold more small blocks than there are
    return mass[:, :, : ceil_div(queries, block_q)].contiguous(), found
