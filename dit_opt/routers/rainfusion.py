"""`rainfusion`: a pattern of frames, rows or columns for each head (arXiv 2505.21036)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.rainfusion.sample import count_rows, draw_sample
from dit_opt.kernels.searches.rainfusion.tables import build_tables
from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Goal, Routed, Router, SiteWriter, gather_heads

CHOICE = Slot("rainfusion.choice")
# the most rows that a search looks at
SAMPLED_ROWS = 64


class RainFusion(Router):
    """A search finds the candidate that fits each head; lists follow from it and from shapes."""

    name = "rainfusion"
    needs_grid = True
    launches = 50
    slots = (CHOICE,)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return SAMPLED_ROWS * tokens

    def search(self, site: SiteWriter) -> Routed:
        goal = (site.scale, site.goal.target, site.goal.by_density)
        found = site.emit.call(
            torch.ops.ditopt.rainfusion_recognize_v1.default,
            *(site.q, site.k, site.bias, *goal, *site.grid, BLOCK_Q, BLOCK_K, site.read_boost()),
        )
        choice, recall, density = site.emit.unpack(found, 3)
        return _route(site, choice, recall, density)

    def restore(self, site: SiteWriter) -> Routed:
        return _route(site, site.read(CHOICE))

    def make_tables(self, layout: VideoLayout, goal: Goal, device: torch.device) -> list[Any]:
        where = (layout.frames, layout.height, layout.width, layout.video_start, layout.tokens)
        tables = build_tables(*where, BLOCK_Q, BLOCK_K, device)
        return [tables, draw_sample(tables, count_rows(layout))]

    def name_heads(
        self, sizes: Sequence[int], state: Mapping[str, torch.Tensor]
    ) -> list[str] | None:
        names = build_tables(*sizes, BLOCK_Q, BLOCK_K, torch.device("cpu")).names
        return [names[c].split()[0] for c in state[CHOICE.name].flatten().tolist()]


def _route(site: SiteWriter, choice: Node, *statistics: Node) -> Routed:
    lists = site.emit.call(
        torch.ops.ditopt.rainfusion_plan_v1.default,
        *(choice, site.length, *site.grid, BLOCK_Q, BLOCK_K),
    )
    counts, indices, rows, inverse = site.emit.unpack(lists, 4)
    plan = (*gather_heads(site, rows), counts, indices, {CHOICE: choice})
    return Routed(*plan, *statistics, inverse=inverse, per_head=True)
