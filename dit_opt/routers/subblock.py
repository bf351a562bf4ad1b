"""`subblock`: blocks by the softmax of pooled queries and keys, sixteen tokens to a cell."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, SiteWriter
from dit_opt.routers.block_router import BlockRouter

# tokens in a cell
CELL = 16


class SubBlock(BlockRouter):
    """Scores every pair of cells, which are finer than blocks."""

    name = "subblock"
    launches = 270
    slots = (Slot("subblock.words"),)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return (tokens / CELL) ** 2

    def call_search(
        self, site: SiteWriter, q: Node, k: Node, bias: Node | None
    ) -> tuple[Any, tuple[Any, ...]]:
        goal = (site.scale, site.goal.target, site.goal.by_density)
        blocks = (site.grid[3], site.video, BLOCK_Q, BLOCK_K, CELL, CELL)
        return torch.ops.ditopt.subblock_plan_v2.default, (q, k, bias, *goal, *blocks)
