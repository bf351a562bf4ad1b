"""Tile sizes of the Triton kernel, chosen from a table that was compiled and linted, not tuned.

Every entry compiles without register spills on its architecture (see `dit_opt.kernels.aot`), so no
user waits for an autotuner and no cache has to be shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """One program's tile of `tile_q` queries by `tile_k` keys, and how it is compiled."""

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int


# (padded head dimension, bytes per element) -> the largest tiling that fits. A tiling is cut down
# to the block sizes of the call. Three stages prefetch the block index beside double-buffered keys.
_NVIDIA: dict[tuple[int, int], Tiling] = {
    (32, 2): Tiling(128, 64, 8, 3),
    (64, 2): Tiling(128, 64, 8, 3),
    (128, 2): Tiling(128, 64, 8, 3),
    (256, 2): Tiling(64, 32, 8, 2),
    (32, 4): Tiling(64, 32, 4, 2),
    (64, 4): Tiling(64, 32, 4, 2),
    (128, 4): Tiling(64, 32, 8, 2),
    (256, 4): Tiling(32, 16, 8, 2),
}
