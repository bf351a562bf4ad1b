"""Searches: one file per way of choosing which key blocks each query block keeps.

A search turns queries and keys into a plan (counts and ascending key-block lists, int32) without a
host synchronisation, so that every choice stays data and no graph depends on it. Importing this
package registers the operators.
"""

from __future__ import annotations

from dit_opt.kernels.routers import (
    adaspa,
    frame_tile,
    guard,
    headwise,
    keep_all,
    packing,
    rainfusion,
    subblock,
)

__all__ = [
    "adaspa",
    "frame_tile",
    "guard",
    "headwise",
    "keep_all",
    "packing",
    "rainfusion",
    "subblock",
]
