"""Routers: one file per way of choosing which key blocks each query block keeps.

A router turns queries and keys into a plan (counts and ascending key-block lists, int32, fixed
capacity) without a host synchronisation, so that every choice stays data and no graph depends on
it. Importing this package registers the routers' operators.
"""

from __future__ import annotations

from dit_opt.kernels.routers import (
    adaspa,
    block_mass,
    dense,
    frame_tile,
    guard,
    headwise,
    packing,
    rainfusion,
    sol,
    subblock,
)

__all__ = [
    "adaspa",
    "block_mass",
    "dense",
    "frame_tile",
    "guard",
    "headwise",
    "packing",
    "rainfusion",
    "sol",
    "subblock",
]
