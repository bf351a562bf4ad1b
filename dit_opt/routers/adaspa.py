"""`adaspa`: blocks by the exact softmax mass of one row in sixteen (arXiv 2502.21079)."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, SiteWriter
from dit_opt.routers.block_router import BlockRouter

# one row of so many stands for its neighbours; a search of all costs 0.7 of a dense call
ROW_STEP = 16


class AdaSpa(BlockRouter):
    """Two passes over the keys for a sixteenth of the rows."""

    name = "adaspa"
    launches = 320
    slots = (Slot("adaspa.words"),)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return tokens**2 / ROW_STEP

    def call_search(
        self, site: SiteWriter, q: Node, k: Node, bias: Node | None
    ) -> tuple[Any, tuple[Any, ...]]:
        goal = (site.scale, site.goal.target, site.goal.by_density)
        blocks = (site.grid[3], site.video, BLOCK_Q, BLOCK_K, ROW_STEP)
        return torch.ops.ditopt.adaspa_plan_v2.default, (q, k, bias, *goal, *blocks)
