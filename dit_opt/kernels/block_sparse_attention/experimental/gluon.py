"""Block-sparse attention for Hopper in Gluon: softmax beside the matrix products, by hand.

Plain Triton waits for the scores before the softmax and for the softmax before the values, so that
tensor cores idle meanwhile. Here one warp copies, and each of two groups of four warps attends with
64 of the 128 queries: it issues the scores of the next key block before the product with the values
of this one, and computes its softmax while that product runs (FlashAttention-3, arXiv 2407.08608,
section 3.2).

Compiled ahead of time, linted and replayed on the host with its own source, but never run on a GPU:
off, unless `ditopt tune --variants` measured it to be right and faster.
"""

# Gluon's annotations know neither layouts as constants nor results of several tensors.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_opt.kernels.block_sparse_attention.contract import Arguments
from dit_opt.kernels.block_sparse_attention.experimental import variants
from dit_opt.kernels.block_sparse_attention.experimental.gluon_warps import attend_rows, copy_tiles
from dit_opt.kernels.block_sparse_attention.experimental.variants import choose_grid, name_common
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling
from dit_opt.kernels.launch import Launch

# Queries of a group of four warps, the rows of its matrix products.
ROWS = 64
# Tiles of 16-bit rows of 64 or 128 channels, swizzled as wide as it goes.
TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
# Of each thread, in a warp that copies and in one that attends; 2 * 240 + 24 = 3 * 168.
COPY_REGISTERS, ATTEND_REGISTERS = 24, 240


@gluon.jit
def block_sparse_attention_gluon_kernel(
    p_q, p_k, p_v, p_counts, p_indices, p_order, p_out, p_lse,
    scale_log2, num_queries, num_keys, num_heads, group, plan_heads, query_blocks, capacity,
    stride_ob, stride_oh, stride_on,
    DIM: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    RAGGED_KEYS: gl.constexpr, COPY_REGISTERS: gl.constexpr, ATTEND_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of one block of 2 * ROWS queries (grid axis 0) of one head (axis 1).

    p_q, p_k and p_v are descriptors of [1, 1, ROWS or BLOCK_K, DIM]; the rest is as in
    `kernel.block_sparse_attention_fwd_kernel`.
    """
    row = gl.program_id(1)
    batch = row // num_heads
    head = row % num_heads
    key_head = head // group
    plan_row = (row % plan_heads).to(gl.int64) * query_blocks
    query_block = gl.load(p_order + plan_row + gl.program_id(0))
    first_query = query_block * (2 * ROWS)
    plan_row += query_block
    count = gl.load(p_counts + plan_row)
    p_list = p_indices + plan_row * capacity
    limit = num_keys
    if RAGGED_KEYS:
        limit = num_keys - gl.load(p_list + count - 1, mask=count > 0, other=0) * BLOCK_K

    s_q0 = gl.allocate_shared_memory(p_q.dtype, p_q.block_type.shape, p_q.layout)
    s_q1 = gl.allocate_shared_memory(p_q.dtype, p_q.block_type.shape, p_q.layout)
    s_k = gl.allocate_shared_memory(p_k.dtype, [STAGES, 1, 1, BLOCK_K, DIM], p_k.layout)
    s_v = gl.allocate_shared_memory(p_v.dtype, [STAGES, 1, 1, BLOCK_K, DIM], p_v.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        # both groups read a block
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    p_out += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    p_out += first_query.to(gl.int64) * stride_on
    p_lse += row.to(gl.int64) * num_queries + first_query
    gl.warp_specialize(
        [
            (
                attend_rows,
                (
                    s_q0, s_k, s_v, q_ready.index(0), k_ready, k_free, v_ready, v_free,
                    p_out, p_lse, count, limit, num_queries - first_query, stride_on, scale_log2,
                    DIM, BLOCK_K, STAGES, ROWS, RAGGED_KEYS,
                ),
            ),
            (
                attend_rows,
                (
                    s_q1, s_k, s_v, q_ready.index(1), k_ready, k_free, v_ready, v_free,
                    p_out + stride_on.to(gl.int64) * ROWS, p_lse + ROWS, count, limit,
                    num_queries - first_query - ROWS, stride_on, scale_log2,
                    DIM, BLOCK_K, STAGES, ROWS, RAGGED_KEYS,
                ),
            ),
            (
                copy_tiles,
                (
                    p_q, p_k, p_v, s_q0, s_q1, s_k, s_v, q_ready, k_ready, k_free, v_ready, v_free,
                    p_list, count, batch, head, key_head, first_query, BLOCK_K, STAGES, ROWS,
                ),
            ),
        ],
        [4, 1],
        [ATTEND_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def attend(call: Arguments, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """Same results as `triton.attention.attend`; of the tiling only the stages are chosen.

    Needs a Hopper GPU. Raises ValueError for what the kernel does not take, see `variants.fits`.
    """
    stages = 2 if tiling is None else tiling.num_stages
    return variants.attend("gluon", call, functools.partial(prepare, stages=stages))


def prepare(call: Arguments, order: Tensor, out: Tensor, lse: Tensor, stages: int) -> Launch:
    """The launch of a call that variants take, with `stages` buffers of key and value blocks."""
    dim, block_k = call.q.shape[-1], call.block_k
    sources = {
        name: TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, dim], TILE_LAYOUT)
        for name, x, rows in (
            ("p_q", call.q, ROWS),
            ("p_k", call.k, block_k),
            ("p_v", call.v, block_k),
        )
    }
    return Launch(
        block_sparse_attention_gluon_kernel,
        grid=choose_grid(call),
        args={**sources, **name_common(call, order, out, lse)},
        constexprs={
            "DIM": dim,
            "BLOCK_K": block_k,
            "STAGES": stages,
            "ROWS": ROWS,
            "RAGGED_KEYS": call.k.shape[2] % block_k != 0,
            "COPY_REGISTERS": COPY_REGISTERS,
            "ATTEND_REGISTERS": ATTEND_REGISTERS,
        },
        options={"num_warps": 4},
    )
