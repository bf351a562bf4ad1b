"""What the warps of the Gluon kernel do: one copies, two groups of four attend.

They meet at barriers in shared memory only. Of every buffer there is one that says it is full,
which a copy completes, and one that says it is free, which both groups do.
"""

# Gluon's annotations know neither layouts as constants, nor results of several tensors, nor that
# one function of `gluon.jit` calls another.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def locate(step, STAGES: gl.constexpr):
    """The buffer of a step of the list, and the parity of its barriers when that is filled.

    A wait for the other parity passes at once where a barrier has not completed any phase, so that
    the first copy into a buffer waits for nobody.
    """
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def copy_tiles(
    p_q, p_k, p_v, s_q0, s_q1, s_k, s_v, q_ready, k_ready, k_free, v_ready, v_free, p_list, count,
    batch, head, key_head, first_query,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The warp that copies: the queries, then the key and value blocks of the list."""
    mbarrier.expect(q_ready.index(0), p_q.block_type.nbytes)
    tma.async_copy_global_to_shared(p_q, [batch, head, first_query, 0], q_ready.index(0), s_q0)
    mbarrier.expect(q_ready.index(1), p_q.block_type.nbytes)
    tma.async_copy_global_to_shared(
        p_q, [batch, head, first_query + ROWS, 0], q_ready.index(1), s_q1
    )
    for step in range(count):
        stage, parity = locate(step, STAGES)
        first = gl.load(p_list + step) * BLOCK_K
        mbarrier.wait(k_free.index(stage), parity ^ 1)
        mbarrier.expect(k_ready.index(stage), p_k.block_type.nbytes)
        tma.async_copy_global_to_shared(
            p_k, [batch, key_head, first, 0], k_ready.index(stage), s_k.index(stage)
        )
        mbarrier.wait(v_free.index(stage), parity ^ 1)
        mbarrier.expect(v_ready.index(stage), p_v.block_type.nbytes)
        tma.async_copy_global_to_shared(
            p_v, [batch, key_head, first, 0], v_ready.index(stage), s_v.index(stage)
        )


@gluon.jit
def weigh(b_s, b_max, b_sum, scale_log2, limit, RAGGED_KEYS: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Weights of scores, what the output so far is to be scaled by, the new maximum and sum."""
    if RAGGED_KEYS:
        if limit < b_s.shape[1]:
            o_k = gl.arange(0, b_s.shape[1], gl.SliceLayout(0, S_LAYOUT))
            b_s = gl.where(gl.expand_dims(o_k < limit, 0), b_s, -float("inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2)
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_new, 1))
    b_alpha = gl.exp2(b_max - b_new)
    return b_p, b_alpha, b_new, b_sum * b_alpha + gl.sum(b_p, 1)


@gluon.jit
def attend_rows(
    s_q, s_k, s_v, q_ready, k_ready, k_free, v_ready, v_free, p_out, p_lse, count, limit, rows,
    stride_on, scale_log2,
    DIM: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    RAGGED_KEYS: gl.constexpr,
):  # fmt: skip
    """Four warps that attend with ROWS queries, the values one key block behind the scores.

    p_out and p_lse point to the first query, of which `rows` exist; the last block of the list has
    `limit` keys. A buffer is given back when all products that read it are waited for, and what a
    product reads from registers is held until then.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    b_max = gl.full([ROWS], -float("inf"), gl.float32, S_ROWS)
    b_sum = gl.zeros([ROWS], gl.float32, S_ROWS)
    b_acc = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
    b_none = gl.zeros([ROWS, BLOCK_K], gl.float32, S_LAYOUT)
    mbarrier.wait(q_ready, 0)
    if count > 0:
        s_queries = s_q.reshape([ROWS, DIM])
        mbarrier.wait(k_ready.index(0), 0)
        s_keys = s_k.index(0).reshape([BLOCK_K, DIM]).permute((1, 0))
        b_s = warpgroup_mma(s_queries, s_keys, b_none, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k_free.index(0), count=1)
        here = gl.where(count == 1, limit, BLOCK_K)
        b_p, b_alpha, b_max, b_sum = weigh(
            b_s, b_max, b_sum, scale_log2, here, RAGGED_KEYS, S_LAYOUT
        )
        for step in range(1, count):
            stage, parity = locate(step, STAGES)
            before, parity_before = locate(step - 1, STAGES)
            mbarrier.wait(k_ready.index(stage), parity)
            s_keys = s_k.index(stage).reshape([BLOCK_K, DIM]).permute((1, 0))
            b_s = warpgroup_mma(s_queries, s_keys, b_none, use_acc=False, is_async=True)
            b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_alpha, O_ROWS), 1)
            b_weights = gl.convert_layout(b_p.to(p_out.dtype.element_ty), P_LAYOUT)
            mbarrier.wait(v_ready.index(before), parity_before)
            s_values = s_v.index(before).reshape([BLOCK_K, DIM])
            b_acc = warpgroup_mma(b_weights, s_values, b_acc, is_async=True)
            # The scores are there; the product with the values goes on beside the softmax.
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            mbarrier.arrive(k_free.index(stage), count=1)
            here = gl.where(step == count - 1, limit, BLOCK_K)
            b_p, b_alpha, b_max, b_sum = weigh(
                b_s, b_max, b_sum, scale_log2, here, RAGGED_KEYS, S_LAYOUT
            )
            b_acc, b_weights = warpgroup_mma_wait(0, deps=(b_acc, b_weights))
            mbarrier.arrive(v_free.index(before), count=1)
        last, parity_last = locate(count - 1, STAGES)
        b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_alpha, O_ROWS), 1)
        b_weights = gl.convert_layout(b_p.to(p_out.dtype.element_ty), P_LAYOUT)
        mbarrier.wait(v_ready.index(last), parity_last)
        s_values = s_v.index(last).reshape([BLOCK_K, DIM])
        b_acc = warpgroup_mma(b_weights, s_values, b_acc, is_async=True)
        b_acc, b_weights = warpgroup_mma_wait(0, deps=(b_acc, b_weights))
    b_total = gl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = (b_max + gl.log2(b_total)) * 0.6931471805599453
    b_lse = gl.where(b_sum == 0.0, -float("inf"), b_lse)
    o_q = gl.arange(0, ROWS, S_ROWS)
    gl.store(p_lse + o_q, b_lse, mask=o_q < rows)
    b_out = b_acc / gl.expand_dims(gl.convert_layout(b_total, O_ROWS), 1)
    o_q = gl.arange(0, ROWS, O_ROWS)
    o_d = gl.arange(0, DIM, gl.SliceLayout(0, O_LAYOUT))
    p_tile = p_out + gl.expand_dims(o_q.to(gl.int64) * stride_on, 1) + gl.expand_dims(o_d, 0)
    is_query = gl.expand_dims(o_q < rows, 1)
    gl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=is_query)
