"""`subblock`: blocks by the softmax of pooled queries and keys, sixteen tokens to a cell."""

from __future__ import annotations

import sympy
import torch

from dit_opt.program.slots import Slot
from dit_opt.routers.block_router import BlockRouter

# tokens in a cell
CELL = 16


class SubBlock(BlockRouter):
    """Scores every pair of cells, which are finer than blocks."""

    name = "subblock"
    launches = 270
    operator = torch.ops.ditopt.subblock_plan_v2.default
    cells = (CELL, CELL)
    slots = (Slot("subblock.words"),)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return (tokens / CELL) ** 2
