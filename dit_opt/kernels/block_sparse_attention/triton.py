"""Block-sparse attention for GPUs: one Triton kernel and its launcher.

Key blocks come from lists on the device, so the kernel needs no host synchronisation, and a plan
may change from call to call without a recompile or a new CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.row_order_triton import order_rows
from dit_opt.kernels.block_sparse_attention.tail import Tail
from dit_opt.kernels.block_sparse_attention.tilings import (
    Tiling,
    choose_precision,
    choose_tail_tile,
    choose_tiling,
    is_aligned,
    pad_dim,
    takes_descriptors,
)
from dit_opt.kernels.block_sparse_attention.triton_tail import attend_centroids, pack_lists
from dit_opt.kernels.block_sparse_attention.triton_tiles import attend_tile, load_tile
from dit_opt.kernels.block_sparse_attention.tuning import find_tiling
from dit_opt.kernels.block_sparse_attention.variants import launch_variant
from dit_opt.kernels.scores import LOG2_E


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


def launch(call: Arguments, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """Same results as `reference.attend`; the arguments are not checked here.

    Runs on the device of `q`, or on CPU tensors under TRITON_INTERPRET=1. q, k and v are not
    copied but read through their strides. Without a `tiling` the one that was measured to be the
    fastest is taken, or else that of the table; measurements are of calls without bias and tail.
    A tiling may name another kernel, which raises ValueError for what it does not take.
    """
    q, k, v, key_bias = call.q, call.k, call.v, call.key_bias
    block_q, block_k = call.block_q, call.block_k
    counts, indices = call.counts.contiguous(), call.indices.contiguous()
    tail = Tail(*(x.contiguous() for x in call.tail)) if call.tail else None
    out, lse = new_outputs(q)
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if q.numel() == 0 or keys == 0 or (indices.shape[-1] == 0 and tail is None):
        return out.zero_(), lse.fill_(-torch.inf)
    architecture = read_architecture(q.device)
    padded_dim = pad_dim(dim)
    itemsize = q.element_size()
    sources: list[Tensor | TensorDescriptor] = [q, k, v]
    words = None
    if tail is not None:
        sources += [tail.centroids, tail.values]
        words = pack_lists(counts, indices, ceil_div(keys, block_k))
    aligned = all(is_aligned(x) for x in sources)
    use_descriptors = aligned and takes_descriptors(architecture, itemsize)
    if tiling is None and use_descriptors and tail is None and key_bias is None:
        tiling = find_tiling(q.device, dim, q.dtype, block_q, block_k)
    if tiling is not None and tiling.variant != "plain":
        return launch_variant(call, tiling)
    if tiling is None:
        tiling = choose_tiling(
            architecture, padded_dim, itemsize, block_q, block_k, aligned, tail=tail is not None
        )
    tile_tail = choose_tail_tile(tiling, padded_dim, use_descriptors)
    if key_bias is not None:
        key_bias = key_bias.contiguous()
    if use_descriptors:
        tiles = [tiling.tile_q, tiling.tile_k, tiling.tile_k]
        tiles += [tile_tail] * (len(sources) - 3)
        sources = [
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile, padded_dim])
            for x, tile in zip(sources, tiles, strict=True)
        ]
    query_blocks = ceil_div(queries, block_q)
    grid = (query_blocks * (block_q // tiling.tile_q), batch * heads)
    block_sparse_attention_fwd_kernel[grid](
        *sources[:3],
        # A pointer must be given; it is never read without HAS_BIAS.
        key_bias if key_bias is not None else lse,
        counts,
        indices,
        order_rows(counts),
        out,
        lse,
        call.scale * LOG2_E,
        queries,
        keys,
        heads,
        heads // k.shape[1],
        counts.shape[0] * heads,
        query_blocks,
        indices.shape[-1],
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride()[:3],
        *_broadcast_strides(key_bias),
        # Without a tail, None is a constant and leaves no trace in the machine code.
        *(sources[3:] or (None, None)),
        None if tail is None else tail.log_lengths,
        words,
        None if tail is None else heads // tail.centroids.shape[1],
        *((None, None) if tail is None else _broadcast_strides(tail.log_lengths)),
        DIM=dim,
        PADDED_DIM=padded_dim,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=tiling.tile_q,
        TILE_K=tiling.tile_k,
        TILE_TAIL=tile_tail,
        HAS_BIAS=key_bias is not None,
        RAGGED_KEYS=keys % block_k != 0,
        HAS_TAIL=tail is not None,
        USE_DESCRIPTORS=use_descriptors,
        PRECISION=choose_precision(architecture, padded_dim, itemsize),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out, lse


def _broadcast_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of the first two axes, [B or 1, H or 1, ...]; 0 repeats an axis of size 1."""
    if x is None:
        return 0, 0
    batch, heads = (0 if x.shape[axis] == 1 else x.stride(axis) for axis in range(2))
    return batch, heads


def read_architecture(device: torch.device) -> str:
    """The architecture of a device as Triton names it: "sm_90", "gfx942", ...

    The interpreter, which runs on CPU tensors, stands in for "sm_90".
    """
    if device.type == "cpu":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
