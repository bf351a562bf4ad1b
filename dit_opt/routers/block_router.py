"""What the routers share that weigh blocks in one order of the tokens for all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Node

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.plan.plan import lay_blocks
from dit_opt.kernels.token_order import build_cube_order
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Goal, Routed, Router, SiteWriter, select_tokens
from dit_opt.routers.word_lists import read_lists, write_words


class BlockRouter(Router):
    """Searches in the cube order where there is a grid, else in the model's own.

    Tokens that are in the order already stay where they are. A subclass keeps its lists in the one
    slot that it has.

    Attributes:
        operator: searches blocks. cells: its arguments behind the sizes of blocks.
    """

    cube_order = True
    operator: ClassVar[Any]
    cells: ClassVar[tuple[int, ...]]

    def search(self, site: SiteWriter) -> Routed:
        q, k, v, bias, inverse = _order(site)
        goal = (site.scale, site.goal.target, site.goal.by_density)
        blocks = (site.grid[3], site.video, BLOCK_Q, BLOCK_K, *self.cells)
        boost = site.read_boost()
        named = {} if boost is None else {"boost": boost}
        found = site.emit.call(self.operator, q, k, bias, *goal, *blocks, **named)
        counts, indices, recall, density = site.emit.unpack(found, 4)
        state = {self.slots[0]: write_words(site, counts, indices)}
        return Routed(q, k, v, bias, counts, indices, state, recall, density, inverse)

    def restore(self, site: SiteWriter) -> Routed:
        q, k, v, bias, inverse = _order(site)
        words, counts, indices = read_lists(site, self.slots[0])
        state = {self.slots[0]: words}
        return Routed(q, k, v, bias, counts, indices, state, inverse=inverse)

    def make_tables(self, layout: VideoLayout, goal: Goal, device: torch.device) -> list[Any]:
        where = (layout.tokens, layout.video_start, layout.video_tokens)
        blocks = lay_blocks(*where, BLOCK_Q, BLOCK_K, device)
        return [blocks, build_cube_order(layout, device)]


def make_region_order(sizes: Sequence[int], device: torch.device) -> Any:
    """The cube order of tokens without text, for (T, H, W, N)."""
    t, h, w, tokens = sizes
    return build_cube_order(VideoLayout(t, h, w, 0, tokens), device)


def _order(site: SiteWriter) -> tuple[Node, Node, Node, Node | None, Node | None]:
    """Queries, keys, values and bias in the order, and the permutation back."""
    qkv = (site.q, site.k, site.v)
    if not site.has_grid or site.ordered:
        return *qkv, site.bias, None
    emit, bias = site.emit, site.bias
    order = emit.call(torch.ops.ditopt.cube_order_v1.default, site.q, *site.grid, site.length)
    rows, inverse = emit.unpack(order, 2)
    q, k, v = (select_tokens(emit, x, rows) for x in qkv)
    if bias is not None:
        bias = emit.call(torch.index_select, bias, 2, rows)
    return q, k, v, bias, inverse
