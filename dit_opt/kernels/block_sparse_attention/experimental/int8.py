"""Block-sparse attention with scores from 8-bit queries and keys, twice the rate of 16-bit ones.

A block of queries or keys shares one scale. Keys have a part in common that is large in many models
and would take most of the 8 bits; their mean over all tokens is taken off first, which softmax does
not see (SageAttention, arXiv 2410.02367, section 4.2). The weights and the values keep 16 bits.

The output differs from that of the other kernels by what 8 bits leave out, 1.2 to 1.3 % in L2 of
normal inputs whatever the keys have in common (up to 6 % in tests without taking their mean off).
So this is no tiling that one may swap in unseen: it is only measured, and nothing calls it.
Compiled ahead of time, linted and interpreted, but never run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div
from dit_opt.kernels.block_sparse_attention.experimental import variants
from dit_opt.kernels.block_sparse_attention.experimental.int8_tiles import (
    attend_int8,
    quantize_kernel,
)
from dit_opt.kernels.block_sparse_attention.experimental.variants import choose_grid, name_common
from dit_opt.kernels.launch import Launch, name_strides

TILE_K, WARPS, STAGES = 64, 8, 3
QUANTIZE_WARPS = 8


@triton.jit
def block_sparse_attention_int8_kernel(
    p_q, p_k, p_v, p_q_scales, p_k_scales, p_shifts, p_counts, p_indices, p_order, p_out, p_lse,
    scale_log2, num_queries, num_keys, num_heads, group, plan_heads, query_blocks, capacity,
    key_blocks, stride_ob, stride_oh, stride_on,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of one query block (grid axis 0) of one head (axis 1) over its key blocks.

    p_q and p_k are descriptors of int8 [1, 1, BLOCK_Q or TILE_K, DIM], p_v is one of 16-bit tiles;
    p_q_scales and p_k_scales point to one scale of each block, p_shifts to the natural score of
    each query with the mean key. The rest is as in `kernel.block_sparse_attention_fwd_kernel`.
    """
    TILES: tl.constexpr = BLOCK_K // TILE_K
    row = tl.program_id(1)
    batch = row // num_heads
    head = row % num_heads
    key_head = head // group
    plan_row = (row % plan_heads).to(tl.int64) * query_blocks
    query_block = tl.load(p_order + plan_row + tl.program_id(0))
    first_query = query_block * BLOCK_Q
    plan_row += query_block
    count = tl.load(p_counts + plan_row)
    p_list = p_indices + plan_row * capacity
    q_scale = tl.load(p_q_scales + row.to(tl.int64) * query_blocks + query_block) * scale_log2
    p_k_scales += (batch.to(tl.int64) * (num_heads // group) + key_head) * key_blocks
    b_q = p_q.load([batch, head, first_query, 0]).reshape(BLOCK_Q, DIM)
    b_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_acc = tl.zeros([BLOCK_Q, DIM], tl.float32)

    full = count
    if RAGGED_KEYS:
        last = tl.load(p_list + count - 1, mask=count > 0, other=0)
        is_ragged = (count > 0) & ((last + 1) * BLOCK_K > num_keys)
        full = count - is_ragged.to(tl.int32)
    for step in tl.range(0, full * TILES):
        block = tl.load(p_list + step // TILES)
        first = block * BLOCK_K + (step % TILES) * TILE_K
        b_max, b_sum, b_acc = attend_int8(
            b_q, b_max, b_sum, b_acc, p_k, p_v, batch, key_head, first, num_keys,
            q_scale * tl.load(p_k_scales + block), TILE_K, DIM, False,
        )  # fmt: skip
    if RAGGED_KEYS:
        if is_ragged:
            scale = q_scale * tl.load(p_k_scales + last)
            for first in tl.range(last * BLOCK_K, num_keys, TILE_K, num_stages=1):
                b_max, b_sum, b_acc = attend_int8(
                    b_q, b_max, b_sum, b_acc, p_k, p_v, batch, key_head, first, num_keys,
                    scale, TILE_K, DIM, True,
                )  # fmt: skip

    o_q = first_query + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, DIM)
    is_query = o_q < num_queries
    o_lse = row.to(tl.int64) * num_queries + o_q
    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    # what the mean took off every score of a query comes back here
    b_shift = tl.load(p_shifts + o_lse, mask=is_query, other=0.0) * scale_log2
    b_lse = (b_max + tl.math.log2(b_total) + b_shift) * 0.6931471805599453
    b_lse = tl.where(b_sum == 0.0, -float("inf"), b_lse)
    tl.store(p_lse + o_lse, b_lse, mask=is_query)
    p_out += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    b_out = (b_acc / b_total[:, None]).to(p_out.dtype.element_ty)
    p_tile = p_out + o_q.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    tl.store(p_tile, b_out, mask=is_query[:, None])


@dataclass(frozen=True, eq=False)
class Quantized:
    """Blocks of rows in 8 bits: values int8 [B, H, N, D], scales float32 [B, H, blocks]."""

    values: Tensor
    scales: Tensor


def average_keys(k: Tensor) -> Tensor:
    """The mean key of each head over all tokens: [B, Hk, Nk, D] -> float32 [B, Hk, D]."""
    return k.mean(2, dtype=torch.float32)


def quantize_keys(k: Tensor, mean: Tensor, block: int) -> Quantized:
    """Keys less their mean, in blocks of `block` tokens."""
    return _quantize(k, mean, block, None)


def quantize_queries(q: Tensor, mean: Tensor, block: int) -> tuple[Quantized, Tensor]:
    """Queries in blocks of `block`, and the product of each with its mean key: float32 [B, H, Nq].

    `mean` is that of the keys, [B, Hk, D].
    """
    shifts = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _quantize(q, mean, block, shifts), shifts


def _quantize(x: Tensor, mean: Tensor, block: int, shifts: Tensor | None) -> Quantized:
    scales_shape = (*x.shape[:2], ceil_div(x.shape[2], block))
    made = Quantized(
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(scales_shape, dtype=torch.float32, device=x.device),
    )
    prepare_quantize(x, mean.contiguous(), block, made, shifts).run()
    return made


def prepare_quantize(
    x: Tensor, mean: Tensor, block: int, made: Quantized, shifts: Tensor | None
) -> Launch:
    """The launch that writes `made`, and for queries, which have `shifts`, these as well."""
    batch, heads, tokens, dim = x.shape
    return Launch(
        quantize_kernel,
        grid=(made.scales.shape[2], batch * heads),
        args={
            "p_x": x,
            "p_mean": mean,
            "p_values": made.values,
            "p_scales": made.scales,
            # A pointer must be given; it is never written for keys.
            "p_shifts": made.scales if shifts is None else shifts,
            "tokens": tokens,
            "num_heads": heads,
            "group": heads // mean.shape[1],
            **name_strides("x", "bhn", x),
        },
        constexprs={"DIM": dim, "BLOCK": block, "IS_QUERY": shifts is not None},
        options={"num_warps": QUANTIZE_WARPS},
    )


def attend(call: Arguments) -> tuple[Tensor, Tensor]:
    """Same results as `triton.attention.attend`, less what 8 bits leave out.

    Needs a Hopper GPU, or runs on CPU tensors under TRITON_INTERPRET=1. Raises ValueError for what
    the kernel does not take, see `variants.fits`.
    """
    return variants.attend("int8", call, _quantize_and_prepare)


def _quantize_and_prepare(call: Arguments, order: Tensor, out: Tensor, lse: Tensor) -> Launch:
    mean = average_keys(call.k)
    queries, shifts = quantize_queries(call.q, mean, call.block_q)
    keys = quantize_keys(call.k, mean, call.block_k)
    return prepare(call, queries, shifts, keys, order, out, lse)


def prepare(
    call: Arguments,
    queries: Quantized,
    shifts: Tensor,
    keys: Quantized,
    order: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Launch:
    """The launch of a call that variants take, with its queries and keys in 8 bits."""
    dim = call.q.shape[-1]
    sources = {
        name: TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, dim])
        for name, x, rows in (
            ("p_q", queries.values, call.block_q),
            ("p_k", keys.values, TILE_K),
            ("p_v", call.v, TILE_K),
        )
    }
    return Launch(
        block_sparse_attention_int8_kernel,
        grid=choose_grid(call),
        args={
            **sources,
            "p_q_scales": queries.scales,
            "p_k_scales": keys.scales,
            "p_shifts": shifts,
            "key_blocks": keys.scales.shape[-1],
            **name_common(call, order, out, lse),
        },
        constexprs={
            "DIM": dim,
            "BLOCK_Q": call.block_q,
            "BLOCK_K": call.block_k,
            "TILE_K": TILE_K,
            "RAGGED_KEYS": call.k.shape[2] % call.block_k != 0,
        },
        options={"num_warps": WARPS, "num_stages": STAGES},
    )
