"""Thresholds on scores that keep a wanted sum, by bisection on the bits of a float.

Sorting all blocks of a layer would take several copies of them and 64-bit indices. Bisection down
to the last bit of a float32 reads the scores 29 times and keeps the same blocks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from dit_opt.kernels.plan.impl.cpp import thresholds as cpp

# The least score; lower ones are not told apart. A row of 2^17 such shares sums to 10^-4.
LIGHTEST = 2.0**-30

# Above every finite score: a block of 1 token instead of 128 that has all mass of its row scores
# 2^7, and 2^15 as a loss.
HEAVIEST = 2.0**16

# Their bits as integers, which sort as the floats do.
_LOWEST, _HIGHEST = (struct.unpack("=i", struct.pack("=f", x))[0] for x in (LIGHTEST, HEAVIEST))


def find_threshold(
    scores: Tensor,
    gains: Tensor,
    target: float | Tensor,
    dims: tuple[int, ...],
    *,
    within: bool = False,
) -> Tensor:
    """The threshold at or above which scores are kept, float32, of size 1 along `dims`.

    The highest one at which the kept gains sum to at least `target` over `dims`; with `within`, the
    lowest one at which they sum to at most `target`. Where there is none, everything is kept, or
    with `within` only infinite scores.

    Args:
        scores: float32, in [LIGHTEST, HEAVIEST), or infinite for what is always kept.
        gains: nonnegative float32 that broadcasts to the scores.
    """
    steps = (_HIGHEST - _LOWEST + 1).bit_length()
    shape = [1 if axis - scores.dim() in dims else n for axis, n in enumerate(scores.shape)]
    groups = math.prod(shape)
    rows = scores.reshape(groups, -1).contiguous()
    gains = gains.expand(scores.shape[scores.dim() - gains.dim() :])
    if rows.shape[-1] % gains.numel():
        # Gains that differ from group to group cannot repeat.
        gains = gains.expand(scores.shape)
    if not isinstance(target, Tensor):
        target = scores.new_full((), target)
    targets = target.expand(shape).reshape(groups).contiguous()
    search = _find_kernel(scores)
    # The search starts from bits that hold by definition: the lowest threshold, or with `within`,
    # where it looks for the last one that exceeds, the one below it.
    low = search(rows, gains.contiguous(), targets, _LOWEST - within, steps, within).view(shape)
    return (low.clamp(max=_HIGHEST) + within).view(torch.float32)


def _find_kernel(scores: Tensor) -> Callable[..., Tensor]:
    """`search_bits` for the device of the scores."""
    if scores.is_cuda:
        # Imported here because Triton is absent where there is no GPU to run it on.
        from dit_opt.kernels.plan.impl.triton.thresholds import search_bits

        return search_bits
    return cpp.search_bits if cpp.can_search() else _search_bits


def _search_bits(
    scores: Tensor, gains: Tensor, target: Tensor, lowest: int, steps: int, within: bool
) -> Tensor:
    """As `triton.thresholds.search_bits`, by torch's operators."""
    groups, size = scores.shape
    gains = gains.flatten().repeat(max(1, size // gains.numel())).view(-1, size)
    low = scores.new_full((groups,), lowest, dtype=torch.int32)
    nothing = gains.new_zeros(())
    for step in reversed(range(steps)):
        middle = low + (1 << step)
        kept = scores >= middle.view(torch.float32)[:, None]
        total = torch.where(kept, gains, nothing).sum(1)
        rises = total > target if within else total >= target
        low = torch.where(rises, middle, low)
    return low
