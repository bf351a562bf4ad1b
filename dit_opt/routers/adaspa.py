"""`adaspa`: blocks by the exact softmax mass of one row in sixteen (arXiv 2502.21079)."""

from __future__ import annotations

import sympy
import torch

from dit_opt.program.slots import Slot
from dit_opt.routers.block_router import BlockRouter

# one row of so many stands for its neighbours; a search of all costs 0.7 of a dense call
ROW_STEP = 16


class AdaSpa(BlockRouter):
    """Two passes over the keys for a sixteenth of the rows."""

    name = "adaspa"
    launches = 320
    operator = torch.ops.ditopt.adaspa_plan_v2.default
    cells = (ROW_STEP,)
    slots = (Slot("adaspa.words"),)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return tokens**2 / ROW_STEP
