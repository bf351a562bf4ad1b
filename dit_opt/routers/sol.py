"""`sol`: blocks by the scores of pooled tokens, coarse."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, SPREAD, SiteWriter
from dit_opt.routers.block_router import BlockRouter

# tokens in a cell
CELL = 16


class Sol(BlockRouter):
    """Scores the means of blocks."""

    name = "sol"
    launches = 270
    slots = (Slot("sol.words"),)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return (tokens / CELL) ** 2

    def call_search(
        self, site: SiteWriter, q: Node, k: Node, bias: Node | None
    ) -> tuple[Any, tuple[Any, ...]]:
        by = "density" if site.goal.by_density else "quality"
        goal = (site.scale, site.goal.target, by)
        blocks = (site.grid[3], site.video, BLOCK_Q, BLOCK_K, SPREAD)
        return torch.ops.ditopt.sol_plan_v1.default, (q, k, bias, *goal, *blocks)
