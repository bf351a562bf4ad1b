"""Lists of blocks from masks and from bits, and bits from lists, by C++ kernels.

Every function returns None where the library is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.cpp.arguments import count, point
from dit_opt.kernels.cpp.build import load_library


def list_blocks(kept: Tensor) -> tuple[Tensor, Tensor] | None:
    """Counts int32 `[..., nq]` and ascending lists int32 `[..., nq, nk]`, zero behind their counts,
    of a mask bool `[..., nq, nk]`."""
    library = load_library()
    if library is None:
        return None
    kept = kept.contiguous()
    counts = kept.new_empty(kept.shape[:-1], dtype=torch.int32)
    lists = kept.new_empty(kept.shape, dtype=torch.int32)
    sizes = count(counts.numel(), kept.shape[-1])
    library.ditopt_list_blocks(point(kept), *sizes, point(counts), point(lists))
    return counts, lists


def pack_lists(counts: Tensor, lists: Tensor, blocks: int) -> Tensor | None:
    """Words int32 `[..., nq, ceil(blocks / 32)]` of counts int32 `[..., nq]` and lists int32
    `[..., nq, length]`."""
    library = load_library()
    if library is None:
        return None
    counts, lists = counts.contiguous(), lists.contiguous()
    words = counts.new_empty((*counts.shape, -(-blocks // 32)))
    sizes = count(counts.numel(), lists.shape[-1], words.shape[-1])
    library.ditopt_pack_lists(point(counts), point(lists), *sizes, point(words))
    return words


def unpack_lists(words: Tensor, blocks: int) -> tuple[Tensor, Tensor] | None:
    """Counts int32 `[..., nq]` and ascending lists int32 `[..., nq, blocks]`, zero behind their
    counts, of int32 words `[..., nq, W]`."""
    library = load_library()
    if library is None:
        return None
    words = words.contiguous()
    counts = words.new_empty(words.shape[:-1])
    lists = words.new_empty((*words.shape[:-1], blocks))
    sizes = count(counts.numel(), words.shape[-1], blocks)
    library.ditopt_unpack_lists(point(words), *sizes, point(counts), point(lists))
    return counts, lists
