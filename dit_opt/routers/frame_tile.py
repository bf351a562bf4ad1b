"""`frame_tile`: the own and reference frames of each tile; nothing is searched."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch.fx import Node

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.frame_tile import build_tiles
from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Goal, Routed, Router, SiteWriter

# the boost that the plan was made with: which heads the guard had made dense
PLANNED_BOOST = Slot("frame_tile.boost", blank=1.0)


class FrameTile(Router):
    """Lists follow from shapes; only which heads the guard made dense is kept."""

    name = "frame_tile"
    needs_grid = True
    knows_recall = False
    density = 0.25
    slots = (PLANNED_BOOST,)

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return sympy.Integer(0)

    def search(self, site: SiteWriter) -> Routed:
        return _route(site, site.read_boost())

    def restore(self, site: SiteWriter) -> Routed:
        boost = site.read(PLANNED_BOOST, dtype=torch.float32) if site.boosted else None
        routed = _route(site, boost)
        return dataclasses.replace(routed, recall=None, density=None)

    def make_tables(self, layout: VideoLayout, goal: Goal, device: torch.device) -> list[Any]:
        return [build_tiles(layout, goal.target, BLOCK_Q, BLOCK_K, device)]


def _route(site: SiteWriter, boost: Node | None) -> Routed:
    plan = site.emit.call(
        torch.ops.ditopt.frame_tile_plan_v1.default,
        *(site.q, site.goal.target, *site.grid, BLOCK_Q, BLOCK_K, boost),
    )
    counts, indices, recall, density = site.emit.unpack(plan, 4)
    state = {} if boost is None else {PLANNED_BOOST: boost}
    lists = (site.q, site.k, site.v, site.bias, counts, indices)
    return Routed(*lists, state, recall, density)
