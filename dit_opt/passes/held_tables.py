"""The tables that a site's ops look up, made before a compiled graph asks for them.

Orders and block layouts depend on shapes alone and are cached. Made inside of a CUDA graph they
would lie in its memory and be lost with it; a graph also keeps their addresses, so that whoever
replays it must keep them alive.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.plan.plan import lay_blocks
from dit_opt.kernels.searches.frame_tile import build_tiles
from dit_opt.kernels.searches.headwise.head_orders import build_orders, list_orders
from dit_opt.kernels.searches.rainfusion.sample import count_rows, draw_sample
from dit_opt.kernels.searches.rainfusion.tables import build_tables
from dit_opt.kernels.token_order import build_cube_order
from dit_opt.passes.plan_nodes import HEADWISE_CELL
from dit_opt.passes.sparse_site import BLOCK_K, BLOCK_Q, SparseSite


def hold_tables(sparse: SparseSite, layout: tuple[int, ...], device: torch.device) -> list[Any]:
    """Everything that the ops of a site look up on a device, for (T, H, W, start, N)."""
    where = (BLOCK_Q, BLOCK_K, device)
    place = VideoLayout(*layout)
    if sparse.router in ("headwise", "oracle"):
        cell = 1 if sparse.router == "oracle" else HEADWISE_CELL
        orders = build_orders(place, BLOCK_Q, BLOCK_K, cell, device)
        return [orders, list_orders(place, *where)]
    if sparse.router == "rainfusion":
        tables = build_tables(*layout, *where)
        return [tables, draw_sample(tables, count_rows(place))]
    if sparse.router == "frame_tile":
        return [build_tiles(place, sparse.target, *where)]
    blocks = lay_blocks(place.tokens, place.video_start, place.video_tokens, *where)
    return [blocks, build_cube_order(place, device)]


def hold_order(grid: tuple[int, ...], length: int, device: torch.device) -> Any:
    """The order of a region's tokens alone, for (T, H, W) and their number."""
    t, h, w = grid
    return build_cube_order(VideoLayout(t, h, w, 0, length), device)
