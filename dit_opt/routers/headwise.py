"""`headwise`: an order of the tokens for each head, and a search for blocks in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import sympy
import torch
from torch.fx import Node

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.headwise.head_orders import ORDER_NAMES, build_orders, list_orders
from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Goal, Routed, Router, SiteWriter, gather_heads
from dit_opt.routers.word_lists import read_lists, read_words, write_words

# A blank plan is read before there is one, by a variant that searches as it is told.
WORDS = Slot("headwise.words", blank=0)
ORDER = Slot("headwise.order", blank=0)


class Headwise(Router):
    """Searches by the exact softmax of one row out of every small box of the video.

    The plan is the lists, and which of three candidate orders each head took.
    """

    name = "headwise"
    density = 0.25
    switchable = True
    launches = 140
    slots = (WORDS, ORDER)
    # one row of so many, drawn out of small boxes of the video
    cell: ClassVar[int] = 16

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return tokens**2 / self.cell

    def search(self, site: SiteWriter) -> Routed:
        arguments = (*self._describe(site), site.read_boost())
        found = site.emit.call(torch.ops.ditopt.headwise_plan_v2.default, *arguments)
        counts, indices, order, recall, density = site.emit.unpack(found, 5)
        words = write_words(site, counts, indices)
        return _route(site, counts, indices, words, order, recall, density)

    def restore(self, site: SiteWriter) -> Routed:
        words, counts, indices = read_lists(site, WORDS)
        return _route(site, counts, indices, words, site.read(ORDER))

    def search_or_restore(self, site: SiteWriter, searches: Node) -> Routed:
        kept = (read_words(site, WORDS), site.read(ORDER))
        arguments = (searches, *kept, *self._describe(site))
        found = site.emit.call(torch.ops.ditopt.headwise_search_or_reuse_v1.default, *arguments)
        counts, indices, order, words, recall, density = site.emit.unpack(found, 6)
        return _route(site, counts, indices, words, order, recall, density)

    def make_tables(self, layout: VideoLayout, goal: Goal, device: torch.device) -> list[Any]:
        orders = build_orders(layout, BLOCK_Q, BLOCK_K, self.cell, device)
        return [orders, list_orders(layout, BLOCK_Q, BLOCK_K, device)]

    def name_heads(
        self, sizes: Sequence[int], state: Mapping[str, torch.Tensor]
    ) -> list[str] | None:
        return [ORDER_NAMES[i] for i in state[ORDER.name].flatten().tolist()]

    def _describe(self, site: SiteWriter) -> tuple[Any, ...]:
        """The arguments of a search."""
        goal = (site.scale, site.goal.target, site.goal.by_density)
        blocks = (BLOCK_Q, BLOCK_K, self.cell)
        return (site.q, site.k, site.bias, *goal, *site.grid, *blocks)


def _route(
    site: SiteWriter, counts: Node, indices: Node, words: Node, order: Node, *statistics: Node
) -> Routed:
    moves = site.emit.call(
        torch.ops.ditopt.headwise_rows_v1.default,
        *(order, site.length, *site.grid, BLOCK_Q, BLOCK_K),
    )
    rows, inverse = site.emit.unpack(moves, 2)
    plan = (*gather_heads(site, rows), counts, indices, {WORDS: words, ORDER: order})
    return Routed(*plan, *statistics, inverse=inverse, per_head=True)
