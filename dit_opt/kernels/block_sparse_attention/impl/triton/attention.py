"""Block-sparse attention for GPUs: what a call launches, and with which tiling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.experimental.variants import attend_by_variant
from dit_opt.kernels.block_sparse_attention.impl.triton.arguments import (
    make_contiguous,
    name_broadcast_strides,
    name_plan,
)
from dit_opt.kernels.block_sparse_attention.impl.triton.kernel import (
    block_sparse_attention_fwd_kernel,
)
from dit_opt.kernels.block_sparse_attention.impl.triton.row_order import prepare_order
from dit_opt.kernels.block_sparse_attention.impl.triton.tail import new_words, prepare_words
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import (
    Tiling,
    choose_precision,
    choose_tail_tile,
    choose_tiling,
    is_aligned,
    pad_dim,
    takes_descriptors,
)
from dit_opt.kernels.block_sparse_attention.impl.triton.tuning import find_tiling
from dit_opt.kernels.launch import Launch, name_strides, read_architecture


def attend(call: Arguments, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """Same results as `reference.attend`; the arguments are not checked here.

    Runs on the device of `q`, or on CPU tensors under TRITON_INTERPRET=1. q, k and v are not
    copied but read through their strides. Without a `tiling` the one that was measured to be the
    fastest is taken, or else that of the table; measurements are of calls without bias and tail.
    A tiling may name another kernel, which raises ValueError for what it does not take.
    """
    if call.is_empty:
        out, lse = new_outputs(call.q)
        return out.zero_(), lse.fill_(-torch.inf)
    call = make_contiguous(call)
    architecture = read_architecture(call.q.device)
    if tiling is None:
        tiling = choose_for_call(call, architecture)
    if tiling.variant != "plain":
        return attend_by_variant(call, tiling)
    out, lse = new_outputs(call.q)
    for launch in prepare(call, out, lse, architecture, tiling):
        launch.run()
    return out, lse


def choose_for_call(call: Arguments, architecture: str) -> Tiling:
    """The tiling that was measured to be the fastest, or else that of the table."""
    q, itemsize = call.q, call.q.element_size()
    aligned = _is_aligned(call)
    use_descriptors = aligned and takes_descriptors(architecture, itemsize)
    if use_descriptors and call.key_bias is None and not call.tail:
        measured = find_tiling(q.device, q.shape[-1], q.dtype, call.block_q, call.block_k)
        if measured is not None:
            return measured
    blocks = (call.block_q, call.block_k)
    return choose_tiling(
        architecture, pad_dim(q.shape[-1]), itemsize, *blocks, aligned, tail=bool(call.tail)
    )


def prepare(
    call: Arguments, out: Tensor, lse: Tensor, architecture: str, tiling: Tiling
) -> list[Launch]:
    """The launches that fill `out` and `lse` of a call of `make_contiguous`; the last one attends.

    The tiling is one of the plain kernel.
    """
    order = torch.empty_like(call.counts)
    launches = [prepare_order(call.counts, order)]
    words = None
    if call.tail:
        words = new_words(call.counts, ceil_div(call.k.shape[2], call.block_k))
        launches.append(prepare_words(call.counts, call.indices, words))
    dim, itemsize = call.q.shape[-1], call.q.element_size()
    use_descriptors = takes_descriptors(architecture, itemsize) and _is_aligned(call)
    tile_tail = choose_tail_tile(tiling, pad_dim(dim), use_descriptors)
    sources: dict[str, Any] = {"p_q": call.q, "p_k": call.k, "p_v": call.v}
    tiles = [tiling.tile_q, tiling.tile_k, tiling.tile_k, tile_tail, tile_tail]
    if call.tail:
        sources |= {"p_centroids": call.tail[0], "p_values": call.tail[1]}
    if use_descriptors:
        sources = {
            name: TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile, pad_dim(dim)])
            for (name, x), tile in zip(sources.items(), tiles)
        }
    batch, heads = call.q.shape[:2]
    attention = Launch(
        block_sparse_attention_fwd_kernel,
        grid=(call.counts.shape[2] * (call.block_q // tiling.tile_q), batch * heads),
        args={
            # A pointer must be given; it is never read without HAS_BIAS.
            "p_bias": lse if call.key_bias is None else call.key_bias,
            "p_out": out,
            "p_lse": lse,
            **name_plan(call, order),
            **name_strides("q", "bhnd", call.q),
            **name_strides("k", "bhnd", call.k),
            **name_strides("v", "bhnd", call.v),
            **name_strides("o", "bhn", out),
            **name_broadcast_strides("bias", call.key_bias),
            **_name_tail(call, words),
            **sources,
        },
        constexprs={
            "DIM": dim,
            "PADDED_DIM": pad_dim(dim),
            "BLOCK_Q": call.block_q,
            "BLOCK_K": call.block_k,
            "TILE_Q": tiling.tile_q,
            "TILE_K": tiling.tile_k,
            "TILE_TAIL": tile_tail,
            "HAS_BIAS": call.key_bias is not None,
            "RAGGED_KEYS": call.k.shape[2] % call.block_k != 0,
            "HAS_TAIL": bool(call.tail),
            "USE_DESCRIPTORS": use_descriptors,
            "PRECISION": choose_precision(architecture, pad_dim(dim), itemsize),
        },
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
    )
    return [*launches, attention]


def _is_aligned(call: Arguments) -> bool:
    """Whether every tensor that tiles are loaded from is aligned."""
    return all(is_aligned(x) for x in (call.q, call.k, call.v, *call.tail[:2]))


def _name_tail(call: Arguments, words: Tensor | None) -> dict[str, Any]:
    """What the kernel reads of a tail beside its centroids and values."""
    names = ("p_centroids", "p_values", "p_log_lengths", "p_words", "tail_group")
    names += ("stride_len_b", "stride_len_h")
    if not call.tail:
        # None is a constant and leaves no trace in the machine code.
        return dict.fromkeys(names)
    centroids, _, log_lengths = call.tail
    return {
        "p_log_lengths": log_lengths,
        "p_words": words,
        "tail_group": call.q.shape[1] // centroids.shape[1],
        **name_broadcast_strides("len", log_lengths),
    }
