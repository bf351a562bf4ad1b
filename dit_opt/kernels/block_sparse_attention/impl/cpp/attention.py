"""Block-sparse attention in float32 by the C++ kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div
from dit_opt.kernels.cpp.arguments import count, list_strides, point
from dit_opt.kernels.cpp.build import load_library
from dit_opt.kernels.scores import LOG2_E
from dit_opt.kernels.scratch import SCRATCH

# What vectors of all widths divide, and what the buffers of the kernel hold.
_UNIT, _MOST_CHANNELS, _MOST_KEYS = 16, 256, 128


def fits(call: Arguments) -> str:
    """Why the kernel does not take a call; empty if it does."""
    dim, block_k = call.q.shape[-1], call.block_k
    if call.tail:
        return "it has no centroid tail"
    if call.q.dtype != torch.float32:
        return f"it takes float32, not {call.q.dtype}"
    if dim % _UNIT or dim > _MOST_CHANNELS:
        return f"it takes multiples of {_UNIT} channels up to {_MOST_CHANNELS}, not {dim}"
    if block_k % _UNIT or block_k > _MOST_KEYS:
        return f"it takes key blocks of multiples of {_UNIT} up to {_MOST_KEYS}, not {block_k}"
    if any(x.stride(-1) != 1 for x in (call.q, call.k, call.v)):
        return "it takes rows of contiguous channels"
    return "" if load_library() is not None else "the C++ kernels are not there"


def attend(call: Arguments, out: Tensor, lse: Tensor) -> None:
    """Fill `out`, of any dtype, and `lse` unless it has no size.

    `out` is a transposed view of `[B, N, H, D]` memory.
    """
    library = load_library()
    assert library is not None
    batch, heads, queries, dim = call.q.shape
    key_heads, keys = call.k.shape[1:3]
    blocks = ceil_div(keys, call.block_k)
    threads = torch.get_num_threads()
    counts, indices = call.counts.contiguous(), call.indices.contiguous()
    made = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    packed_size = batch * key_heads * blocks * dim * call.block_k
    packed = SCRATCH.take("packed keys", torch.float32, packed_size)
    key_bias, bias_strides = call.key_bias, (0, 0, 1)
    if key_bias is not None:
        key_bias = key_bias.float().contiguous().expand(batch, heads, keys)
        bias_strides = key_bias.stride()
    library.ditopt_pack_keys(
        point(call.k),
        list_strides(call.k.stride()[:3]),
        point(packed),
        *count(batch, key_heads, keys, dim, call.block_k, threads),
    )
    strides = [x.stride()[:3] for x in (call.q, call.v, made)]
    library.ditopt_attend(
        *map(point, (call.q, packed, call.v, key_bias, counts, indices, made)),
        point(lse if lse.numel() else None),
        list_strides(*strides, bias_strides),
        *count(batch, heads, key_heads, queries, keys, dim, call.block_q, call.block_k),
        *count(indices.shape[-1], counts.shape[0]),
        ctypes.c_float(call.scale * LOG2_E),
        *count(threads),
    )
    if made is not out:
        out.copy_(made)
