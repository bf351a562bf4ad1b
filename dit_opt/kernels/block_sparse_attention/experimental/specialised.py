"""Block-sparse attention whose warps get roles of their own from Triton's compiler.

`warp_specialize=True` makes twelve warps of four: some copy, two groups attend with half of the
queries each, so that one's softmax runs beside the other's matrix products. The compiler does so
only with four warps, one loop and both products in it, and with other ways of loading it silently
makes code that overwrites memory or reads the wrong rows: queries come through a two-dimensional
descriptor made on the device, which it can cut in half, keys and values through ones from the host.
`machine_code.find_misfits` and the roles in every report tell whether a compiler still does.

Compiled ahead of time, linted and interpreted, but never run on a GPU: off, unless `ditopt tune
--variants` measured it to be right and faster.
"""

# Triton annotates shapes and offsets as lists of tensors, and takes numbers and constants, too.
# pyright: reportArgumentType=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_opt.kernels.block_sparse_attention.contract import Arguments
from dit_opt.kernels.block_sparse_attention.experimental import variants
from dit_opt.kernels.block_sparse_attention.experimental.variants import choose_grid, name_common
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling
from dit_opt.kernels.launch import Launch, name_strides


@triton.jit
def block_sparse_attention_specialised_kernel(
    p_q, p_k, p_v, p_counts, p_indices, p_order, p_out, p_lse,
    scale_log2, num_queries, num_keys, num_heads, group, plan_heads, query_blocks, capacity,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of one query block (grid axis 0) of one head (axis 1) over its key blocks.

    p_q is a pointer, p_k and p_v are descriptors of [1, 1, TILE_K, DIM]; the rest is as in
    `kernel.block_sparse_attention_fwd_kernel`.
    """
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
    p_q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    queries = tl.make_tensor_descriptor(p_q, [num_queries, DIM], [stride_qn, 1], [BLOCK_Q, DIM])
    b_q = queries.load([first_query, 0])
    b_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_acc = tl.zeros([BLOCK_Q, DIM], tl.float32)
    TILES: tl.constexpr = BLOCK_K // TILE_K
    for step in tl.range(0, count * TILES, warp_specialize=True):
        first = tl.load(p_list + step // TILES) * BLOCK_K + (step % TILES) * TILE_K
        b_k = p_k.load([batch, key_head, first, 0]).reshape(TILE_K, DIM)
        b_s = tl.dot(b_q, tl.trans(b_k))
        # A second loop for the ragged block would leave all warps the same role.
        if RAGGED_KEYS:
            b_s = tl.where((first + tl.arange(0, TILE_K) < num_keys)[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.math.exp2(b_s * scale_log2 - b_new[:, None])
        b_alpha = tl.math.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_v = p_v.load([batch, key_head, first, 0]).reshape(TILE_K, DIM)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
        b_max = b_new
    o_q = first_query + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, DIM)
    is_query = o_q < num_queries
    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = (b_max + tl.math.log2(b_total)) * 0.6931471805599453
    b_lse = tl.where(b_sum == 0.0, -float("inf"), b_lse)
    tl.store(p_lse + row.to(tl.int64) * num_queries + o_q, b_lse, mask=is_query)
    p_out += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    b_out = (b_acc / b_total[:, None]).to(p_out.dtype.element_ty)
    p_tile = p_out + o_q.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    tl.store(p_tile, b_out, mask=is_query[:, None])


def attend(call: Arguments, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """Same results as `triton.attention.attend`; of the tiling the keys and stages are chosen.

    Needs a Hopper GPU, or runs on CPU tensors under TRITON_INTERPRET=1. Raises ValueError for what
    the kernel does not take, see `variants.fits`.
    """
    if tiling is None:
        tiling = Tiling(call.block_q, call.block_k, 4, 2, "specialised")
    device = call.q.device
    if device.type == "cuda":
        # The descriptor of the queries is written to memory that Triton asks for. It keeps the last
        # allocator it was given; whoever needs another sets it before each call, as here.
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
    return variants.attend("specialised", call, functools.partial(prepare, tiling=tiling))


def prepare(call: Arguments, order: Tensor, out: Tensor, lse: Tensor, tiling: Tiling) -> Launch:
    """The launch of a call that variants take."""
    dim = call.q.shape[-1]
    keys, values = (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tiling.tile_k, dim])
        for x in (call.k, call.v)
    )
    return Launch(
        block_sparse_attention_specialised_kernel,
        grid=choose_grid(call),
        args={
            "p_q": call.q,
            "p_k": keys,
            "p_v": values,
            **name_common(call, order, out, lse),
            **name_strides("q", "bhn", call.q),
        },
        constexprs={
            "DIM": dim,
            "BLOCK_Q": call.block_q,
            "BLOCK_K": call.block_k,
            "TILE_K": tiling.tile_k,
            "RAGGED_KEYS": call.k.shape[2] % call.block_k != 0,
        },
        # With other numbers of warps the compiler gives them no roles, and does not say so.
        options={"num_warps": 4, "num_stages": tiling.num_stages},
    )
