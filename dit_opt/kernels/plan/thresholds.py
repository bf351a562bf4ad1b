"""Thresholds on scores that keep a wanted sum, by bisection on the bits of a float.

Sorting all blocks of a layer would take several copies of them and 64-bit indices. Bisection down
to the last bit of a float32 reads the scores 29 times and keeps the same blocks.
"""

from __future__ import annotations

import functools
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
    kernel = _find_kernel(scores)
    search = _search if kernel is None else functools.partial(_search_rows, kernel)
    # The search starts from bits that hold by definition: the lowest threshold, or with `within`,
    # where it looks for the last one that exceeds, the one below it.
    low = search(scores, gains, target, dims, _LOWEST - within, steps, within)
    return (low.clamp(max=_HIGHEST) + within).view(torch.float32)


def _search(
    scores: Tensor,
    gains: Tensor,
    target: float | Tensor,
    dims: tuple[int, ...],
    lowest: int,
    steps: int,
    within: bool,
) -> Tensor:
    """The bits of the last threshold that holds: `lowest` plus a number of `steps` bits."""
    low = scores.new_full(_reduce(scores, dims), lowest, dtype=torch.int32)
    nothing = gains.new_zeros(())
    for step in reversed(range(steps)):
        middle = low + (1 << step)
        total = torch.where(scores >= middle.view(torch.float32), gains, nothing).sum(dims, True)
        rises = total > target if within else total >= target
        low = torch.where(rises, middle, low)
    return low


def _find_kernel(scores: Tensor) -> Callable[..., Tensor] | None:
    """`search_bits` for the device of the scores, if there is one."""
    if scores.is_cuda:
        # Imported here because Triton is absent where there is no GPU to run it on.
        from dit_opt.kernels.plan.impl.triton.thresholds import search_bits

        return search_bits
    return cpp.search_bits if cpp.can_search() else None


def _search_rows(
    search_bits: Callable[..., Tensor],
    scores: Tensor,
    gains: Tensor,
    target: float | Tensor,
    dims: tuple[int, ...],
    lowest: int,
    steps: int,
    within: bool,
) -> Tensor:
    """As `_search`, by one kernel for all steps."""
    shape = _reduce(scores, dims)
    groups = math.prod(shape)
    rows = scores.reshape(groups, -1).contiguous()
    gains = gains.expand(scores.shape[scores.dim() - gains.dim() :])
    if rows.shape[-1] % gains.numel():
        # Gains that differ from group to group cannot repeat.
        gains = gains.expand(scores.shape)
    if not isinstance(target, Tensor):
        target = scores.new_full((), target)
    targets = target.expand(shape).reshape(groups).contiguous()
    return search_bits(rows, gains.contiguous(), targets, lowest, steps, within).view(shape)


def _reduce(scores: Tensor, dims: tuple[int, ...]) -> list[int]:
    """The shape with 1 along `dims`."""
    return [1 if axis - scores.dim() in dims else n for axis, n in enumerate(scores.shape)]
