"""Thresholds on scores by a C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.cpp.arguments import count, point
from dit_opt.kernels.cpp.build import load_library


def can_search() -> bool:
    """Whether the library is there."""
    return load_library() is not None


def search_bits(
    scores: Tensor, gains: Tensor, target: Tensor, lowest: int, steps: int, within: bool
) -> Tensor:
    """As `triton_thresholds.search_bits`, with sums in float64."""
    library = load_library()
    assert library is not None
    groups, size = scores.shape
    found = scores.new_empty(groups, dtype=torch.int32)
    library.ditopt_search_bits(
        *map(point, (scores, gains, target, found)),
        *count(groups, size, max(1, gains.numel()), lowest, steps, within),
        *count(torch.get_num_threads()),
    )
    return found
