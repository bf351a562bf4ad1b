"""`sol`: blocks by the softmax of one mean query and one mean key of each (arXiv 2607.24027)."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, SiteWriter
from dit_opt.routers.block_router import BlockRouter


class Sol(BlockRouter):
    """The search of `subblock` with one cell for each block."""

    name = "sol"
    launches = 270
    slots = (Slot("sol.words"),)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return tokens**2 / (BLOCK_Q * BLOCK_K)

    def call_search(
        self, site: SiteWriter, q: Node, k: Node, bias: Node | None
    ) -> tuple[Any, tuple[Any, ...]]:
        goal = (site.scale, site.goal.target, site.goal.by_density)
        blocks = (site.grid[3], site.video, BLOCK_Q, BLOCK_K, BLOCK_Q, BLOCK_K)
        return torch.ops.ditopt.subblock_plan_v2.default, (q, k, bias, *goal, *blocks)
