"""Plans out of bits by the C++ kernel."""

from __future__ import annotations

from torch import Tensor

from dit_opt.kernels.native.arguments import count, point
from dit_opt.kernels.native.build import load_library


def unpack_lists(words: Tensor, blocks: int) -> tuple[Tensor, Tensor] | None:
    """Counts int32 `[..., nq]` and ascending lists int32 `[..., nq, blocks]`, zero behind their
    counts, of int32 words `[..., nq, W]`; None where the kernel is not there."""
    library = load_library()
    if library is None:
        return None
    words = words.contiguous()
    counts = words.new_empty(words.shape[:-1])
    lists = words.new_empty((*words.shape[:-1], blocks))
    sizes = count(counts.numel(), words.shape[-1], blocks)
    library.ditopt_unpack_lists(point(words), *sizes, point(counts), point(lists))
    return counts, lists
