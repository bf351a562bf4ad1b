"""`sol`: blocks by the softmax of one mean query and one mean key of each (arXiv 2607.24027)."""

from __future__ import annotations

import sympy
import torch

from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q
from dit_opt.routers.block_router import BlockRouter


class Sol(BlockRouter):
    """The search of `subblock` with one cell for each block."""

    name = "sol"
    launches = 270
    operator = torch.ops.ditopt.subblock_plan_v2.default
    cells = (BLOCK_Q, BLOCK_K)
    slots = (Slot("sol.words"),)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return tokens**2 / (BLOCK_Q * BLOCK_K)
