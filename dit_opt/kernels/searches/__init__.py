"""Searches: one file or folder per way of choosing which key blocks each query block keeps.

A search turns queries and keys into a plan (counts and ascending key-block lists, int32) without a
host synchronisation, so that every choice stays data and no graph depends on it. Importing this
package registers the operators, those on plans included.
"""

from __future__ import annotations

from dit_opt.kernels.plan import guard, packing
from dit_opt.kernels.searches import frame_tile, keep_all
from dit_opt.kernels.searches.adaspa import op as adaspa
from dit_opt.kernels.searches.headwise import op as headwise
from dit_opt.kernels.searches.rainfusion import op as rainfusion
from dit_opt.kernels.searches.subblock import op as subblock

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
