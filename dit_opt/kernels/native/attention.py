"""Block-sparse attention in float32 by the C++ kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_opt.kernels.native.arguments import count, list_strides, point
from dit_opt.kernels.native.build import load_library
from dit_opt.kernels.scores import LOG2_E
from dit_opt.kernels.scratch import SCRATCH

# What vectors of all widths divide, and what the buffers of the kernel hold.
_UNIT, _MOST_CHANNELS, _MOST_KEYS = 16, 256, 128


def can_attend(q: Tensor, k: Tensor, v: Tensor, block_k: int) -> bool:
    """Whether the kernel is there and takes such tensors."""
    dim = q.shape[-1]
    return (
        q.dtype == torch.float32
        and dim % _UNIT == 0
        and dim <= _MOST_CHANNELS
        and block_k % _UNIT == 0
        and block_k <= _MOST_KEYS
        and all(x.stride(-1) == 1 for x in (q, k, v))
        and load_library() is not None
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Same arguments as `reference.attend`, of tensors that `can_attend`; fills `out` and `lse`.

    `out` is a transposed view of `[B, N, H, D]` memory; without `lse` that is left out.
    """
    library = load_library()
    assert library is not None
    batch, heads, queries, dim = q.shape
    key_heads, keys = k.shape[1:3]
    blocks = -(-keys // block_k)
    threads = torch.get_num_threads()
    counts, indices = counts.contiguous(), indices.contiguous()
    packed = SCRATCH.take("packed keys", torch.float32, batch * key_heads * blocks * dim * block_k)
    bias_strides = (0, 0, 1)
    if key_bias is not None:
        key_bias = key_bias.float().contiguous().expand(batch, heads, keys)
        bias_strides = key_bias.stride()
    library.ditopt_pack_keys(
        point(k),
        list_strides(k.stride()[:3]),
        point(packed),
        *count(batch, key_heads, keys, dim, block_k, threads),
    )
    strides = list_strides(q.stride()[:3], v.stride()[:3], out.stride()[:3], bias_strides)
    library.ditopt_attend(
        *map(point, (q, packed, v, key_bias, counts, indices, out, lse)),
        strides,
        *count(batch, heads, key_heads, queries, keys, dim, block_q, block_k),
        *count(indices.shape[-1], counts.shape[0]),
        ctypes.c_float(scale * LOG2_E),
        *count(threads),
    )
