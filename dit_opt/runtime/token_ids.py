"""Grids read from the positions that a pipeline gives its tokens."""

from __future__ import annotations

import itertools
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dit_opt._compat import is_fake

Grid: TypeAlias = "tuple[int, int, int]"

# More numbers for a token than this are no position.
MOST_NUMBERS = 32

# Pipelines number their tokens once for all steps, so what a tensor tells is kept while it lives.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def read_grid(tensor: Tensor, dim: int, start: int, stop: int) -> Grid | None:
    """(T, H, W) of the tokens `start` to before `stop` of `dim`; None where the numbers tell none.

    Every number must depend on the frame, the row or the column of its token alone, and tell them
    apart; pictures one behind the other are frames. A device is waited for, once for each tensor.
    """
    if is_fake(tensor):
        return None
    version = None if tensor.is_inference() else tensor._version
    if tensor not in _read or _read[tensor][0] != version:
        _read[tensor] = version, {}
    kept, place = _read[tensor][1], (dim, start, stop)
    if place not in kept:
        kept[place] = find_grid(tensor.detach().movedim(dim, 0)[start:stop])
    return kept[place]


def find_grid(positions: Tensor) -> Grid | None:
    """The grid of tokens with these positions, `[N, ...]`."""
    if positions.is_complex() or positions[:1].numel() not in range(2, MOST_NUMBERS + 1):
        return None
    numbers = positions.reshape(len(positions), -1).to("cpu", torch.float64).T
    moving = numbers[(numbers != numbers[:, :1]).any(1)]
    if not len(moving):
        return None
    # how many tokens share the first frame, row or column
    runs = sorted({int(n) for n in (moving != moving[:, :1]).int().argmax(1)})
    sizes = [b // a for a, b in itertools.pairwise([*runs, len(positions)])][::-1]
    if runs[0] != 1 or len(sizes) not in (2, 3):
        return None
    t, h, w = [1] * (3 - len(sizes)) + sizes
    if t * h * w != len(positions) or not all(_is_along(row.view(t, h, w)) for row in moving):
        return None
    return t, h, w


def _is_along(numbers: Tensor) -> bool:
    """Whether numbers `[T, H, W]` depend on one of their indices, and differ wherever it does."""
    for axis in range(3):
        line = numbers.movedim(axis, 0).flatten(1)
        if (line == line[:, :1]).all():
            steps = line[:, 0].diff()
            return bool((steps > 0).all() or (steps < 0).all())
    return False
