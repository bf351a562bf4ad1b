"""Block-sparse attention for GPUs: one Triton kernel and its launcher.

Key blocks come from lists on the device, so the kernel needs no host synchronisation, and a plan
may change from call to call without a recompile or a new CUDA graph.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.tilings import (
    choose_precision,
    choose_tiling,
    is_aligned,
    pad_dim,
    takes_descriptors,
)

LOG2_E = math.log2(math.e)


@triton.jit
def _load_tile(
    p_x, batch, head, first, tokens, stride_n, stride_d,
    TILE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[TILE, PADDED_DIM] of one head from token `first` on, zero outside the tensor."""
    if USE_DESCRIPTORS:
        b_x = p_x.load([batch, head, first, 0]).reshape(TILE, PADDED_DIM)
    else:
        o_n = first + tl.arange(0, TILE)
        o_d = tl.arange(0, PADDED_DIM)
        p_tile = p_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :] * stride_d
        if MASKED:
            b_x = tl.load(p_tile, mask=(o_n < tokens)[:, None] & (o_d < DIM)[None, :], other=0.0)
        elif DIM != PADDED_DIM:
            b_x = tl.load(p_tile, mask=(o_d < DIM)[None, :], other=0.0)
        else:
            b_x = tl.load(p_tile)
    return b_x


@triton.jit
def _attend_tile(
    b_q, b_max, b_sum, b_acc, p_k, p_v, p_bias, batch, head, first, num_keys, scale_log2,
    stride_kn, stride_kd, stride_vn, stride_vd,
    TILE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in units of log2 so that the scale folds into one FMA."""
    b_k = _load_tile(
        p_k, batch, head, first, num_keys, stride_kn, stride_kd,
        TILE, DIM, PADDED_DIM, USE_DESCRIPTORS, MASKED,
    )  # fmt: skip
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if HAS_BIAS:
        o_k = first + tl.arange(0, TILE)
        if MASKED:
            b_bias = tl.load(p_bias + o_k, mask=o_k < num_keys, other=-float("inf"))
        else:
            b_bias = tl.load(p_bias + o_k)
        b_s = b_s * scale_log2 + (b_bias * 1.4426950408889634)[None, :]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A bias can leave a row without any key so far, where inf - inf would be NaN.
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.math.exp2(b_s - b_ref[:, None])
    else:
        if MASKED:
            b_s = tl.where((first + tl.arange(0, TILE) < num_keys)[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_ref = b_new
        b_p = tl.math.exp2(b_s * scale_log2 - b_ref[:, None])
    b_alpha = tl.math.exp2(b_max - b_ref)
    b_v = _load_tile(
        p_v, batch, head, first, num_keys, stride_vn, stride_vd,
        TILE, DIM, PADDED_DIM, USE_DESCRIPTORS, MASKED,
    )  # fmt: skip
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def block_sparse_attention_fwd_kernel(
    p_q, p_k, p_v, p_bias, p_counts, p_indices, p_out, p_lse,
    scale_log2, num_queries, num_keys, num_heads, group, plan_heads, query_blocks, capacity,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on,
    stride_bias_b, stride_bias_h,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    RAGGED_KEYS: tl.constexpr, USE_DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one query tile (grid axis 0) of one head (axis 1) over its key blocks.

    p_q, p_k and p_v are descriptors of [1, 1, tile, PADDED_DIM] or pointers. Full key blocks run
    without a mask; a ragged last block is peeled, so that the listed index stays out of the
    arithmetic of the main loop and the compiler can prefetch it.
    """
    first_query = tl.program_id(0) * TILE_Q
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
    plan_row = (row % plan_heads).to(tl.int64) * query_blocks + first_query // BLOCK_Q
    p_list = p_indices + plan_row * capacity
    count = tl.load(p_counts + plan_row)
    TILES: tl.constexpr = BLOCK_K // TILE_K

    b_q = _load_tile(
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
        b_max, b_sum, b_acc = _attend_tile(
            b_q, b_max, b_sum, b_acc, p_k, p_v, p_bias, batch, key_head, first, num_keys,
            scale_log2, stride_kn, stride_kd, stride_vn, stride_vd,
            TILE_K, DIM, PADDED_DIM, HAS_BIAS, USE_DESCRIPTORS, PRECISION, False,
        )  # fmt: skip
    if RAGGED_KEYS:
        if is_ragged:
            for first in tl.range(last * BLOCK_K, num_keys, TILE_K, num_stages=1):
                b_max, b_sum, b_acc = _attend_tile(
                    b_q, b_max, b_sum, b_acc, p_k, p_v, p_bias, batch, key_head, first, num_keys,
                    scale_log2, stride_kn, stride_kd, stride_vn, stride_vd,
                    TILE_K, DIM, PADDED_DIM, HAS_BIAS, USE_DESCRIPTORS, PRECISION, True,
                )  # fmt: skip

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


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `reference.attend`; the arguments are not checked here.

    Runs on the device of `q`, or on CPU tensors under TRITON_INTERPRET=1. Nothing is copied: q, k
    and v are read through their strides.
    """
    out, lse = new_outputs(q)
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if q.numel() == 0 or keys == 0 or indices.shape[-1] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    architecture = read_architecture(q.device)
    padded_dim = pad_dim(dim)
    itemsize = q.element_size()
    aligned = all(is_aligned(x) for x in (q, k, v))
    tiling = choose_tiling(architecture, padded_dim, itemsize, block_q, block_k, aligned)
    use_descriptors = aligned and takes_descriptors(architecture, itemsize)
    counts, indices = counts.contiguous(), indices.contiguous()
    bias_strides = (0, 0)
    if key_bias is not None:
        key_bias = key_bias.contiguous()
        bias_strides = tuple(
            stride if size > 1 else 0
            for size, stride in zip(key_bias.shape[:2], key_bias.stride()[:2], strict=True)
        )
    sources: list[Tensor | TensorDescriptor] = [q, k, v]
    if use_descriptors:
        sources = [
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile, padded_dim])
            for x, tile in ((q, tiling.tile_q), (k, tiling.tile_k), (v, tiling.tile_k))
        ]
    query_blocks = ceil_div(queries, block_q)
    grid = (ceil_div(queries, tiling.tile_q), batch * heads)
    block_sparse_attention_fwd_kernel[grid](
        *sources,
        # A pointer must be given; it is never read without HAS_BIAS.
        key_bias if key_bias is not None else lse,
        counts,
        indices,
        out,
        lse,
        scale * LOG2_E,
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
        *bias_strides,
        DIM=dim,
        PADDED_DIM=padded_dim,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_Q=tiling.tile_q,
        TILE_K=tiling.tile_k,
        HAS_BIAS=key_bias is not None,
        RAGGED_KEYS=keys % block_k != 0,
        USE_DESCRIPTORS=use_descriptors,
        PRECISION=choose_precision(architecture, padded_dim, itemsize),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out, lse


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
