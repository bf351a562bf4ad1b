"""The Triton kernel of block-sparse attention.

Key blocks come from lists on the device, so the kernel needs no host synchronisation, and a plan
may change from call to call without a recompile or a new CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_opt.kernels.block_sparse_attention.impl.triton.tail import attend_centroids
from dit_opt.kernels.block_sparse_attention.impl.triton.tiles import attend_tile, load_tile


@triton.jit
def block_sparse_attention_fwd_kernel(
    p_q, p_k, p_v, p_bias, p_counts, p_indices, p_order, p_out, p_lse,
    scale_log2, num_queries, num_keys, num_heads, group, plan_heads, query_blocks, capacity,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on,
    stride_bias_b, stride_bias_h,
    p_centroids, p_values, p_log_lengths, p_words, tail_group, stride_len_b, stride_len_h,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_TAIL: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAGGED_KEYS: tl.constexpr, HAS_TAIL: tl.constexpr, USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one query tile (grid axis 0) of one head (axis 1) over its key blocks.

    p_q, p_k, p_v, p_centroids and p_values are descriptors of [1, 1, tile, PADDED_DIM] or
    pointers, the last two to contiguous memory. Full key blocks run without a mask; a ragged last
    block is peeled, so that the listed index stays out of the arithmetic of the main loop and the
    compiler can prefetch it. The centroids come last, all of them, kept ones without weight.

    Programs start head after head, whose keys then stay in the second-level cache, and within a
    head with the longest list, or one that comes last would be waited for.
    """
    TILES_Q: tl.constexpr = BLOCK_Q // TILE_Q
    row = tl.program_id(1)
    batch = row // num_heads
    head = row % num_heads
    key_head = head // group
    if not USE_DESCRIPTORS:
        p_q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        p_k += batch.to(tl.int64) * stride_kb + key_head.to(tl.int64) * stride_kh
        p_v += batch.to(tl.int64) * stride_vb + key_head.to(tl.int64) * stride_vh
    if HAS_BIAS:
        p_bias += batch.to(tl.int64) * stride_bias_b + head.to(tl.int64) * stride_bias_h
    plan_row = (row % plan_heads).to(tl.int64) * query_blocks
    p_order += plan_row + tl.program_id(0) // TILES_Q
    query_block = tl.load(p_order)
    first_query = query_block * BLOCK_Q + (tl.program_id(0) % TILES_Q) * TILE_Q
    plan_row += query_block
    p_list = p_indices + plan_row * capacity
    # a ragged last block may end before its last tile
    count = tl.where(first_query < num_queries, tl.load(p_counts + plan_row), 0)
    TILES: tl.constexpr = BLOCK_K // TILE_K

    b_q = load_tile(
        p_q, batch, head, first_query, num_queries, stride_qn, stride_qd,
        TILE_Q, DIM, PADDED_DIM, USE_DESCRIPTORS, True,
    )  # fmt: skip
    b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q], tl.float32)
    b_acc = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)

    full = count
    if RAGGED_KEYS:
        last = tl.load(p_list + count - 1, mask=count > 0, other=0)
        is_ragged = (count > 0) & ((last + 1) * BLOCK_K > num_keys)
        full = count - is_ragged.to(tl.int32)
    for step in tl.range(0, full * TILES):
        first = tl.load(p_list + step // TILES) * BLOCK_K + (step % TILES) * TILE_K
        b_max, b_sum, b_acc = attend_tile(
            b_q, b_max, b_sum, b_acc, p_k, p_v, p_bias, batch, key_head, first, num_keys,
            scale_log2, stride_kn, stride_kd, stride_vn, stride_vd,
            TILE_K, DIM, PADDED_DIM, HAS_BIAS, USE_DESCRIPTORS, PRECISION, False,
        )  # fmt: skip
    if RAGGED_KEYS:
        if is_ragged:
            for first in tl.range(last * BLOCK_K, num_keys, TILE_K, num_stages=1):
                b_max, b_sum, b_acc = attend_tile(
                    b_q, b_max, b_sum, b_acc, p_k, p_v, p_bias, batch, key_head, first, num_keys,
                    scale_log2, stride_kn, stride_kd, stride_vn, stride_vd,
                    TILE_K, DIM, PADDED_DIM, HAS_BIAS, USE_DESCRIPTORS, PRECISION, True,
                )  # fmt: skip
    if HAS_TAIL:
        blocks = tl.cdiv(num_keys, BLOCK_K)
        tail_head = head // tail_group
        if not USE_DESCRIPTORS:
            tail_row = batch.to(tl.int64) * (num_heads // tail_group) + tail_head
            p_centroids += tail_row * blocks * DIM
            p_values += tail_row * blocks * DIM
        p_log_lengths += batch.to(tl.int64) * stride_len_b + head.to(tl.int64) * stride_len_h
        p_words += plan_row * tl.cdiv(blocks, 32)
        for first in tl.range(0, blocks, TILE_TAIL):
            b_max, b_sum, b_acc = attend_centroids(
                b_q, b_max, b_sum, b_acc, p_centroids, p_values, p_log_lengths, p_words,
                batch, tail_head, first, blocks, scale_log2,
                TILE_TAIL, DIM, PADDED_DIM, USE_DESCRIPTORS, PRECISION,
            )  # fmt: skip

    if not USE_DESCRIPTORS:
        # Read again, or it would take a register throughout the loop, which pointers leave none of.
        query_block = tl.load(p_order, volatile=True)
        first_query = query_block * BLOCK_Q + (tl.program_id(0) % TILES_Q) * TILE_Q
    o_q = first_query + tl.arange(0, TILE_Q)
    o_d = tl.arange(0, PADDED_DIM)
    is_query = o_q < num_queries
    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = (b_max + tl.math.log2(b_total)) * 0.6931471805599453
    b_lse = tl.where(b_sum == 0.0, -float("inf"), b_lse)
    tl.store(p_lse + row.to(tl.int64) * num_queries + o_q, b_lse, mask=is_query)
    p_out += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    b_out = (b_acc / b_total[:, None]).to(p_out.dtype.element_ty)
    p_tile = p_out + o_q.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    tl.store(p_tile, b_out, mask=is_query[:, None] & (o_d < DIM)[None, :])
