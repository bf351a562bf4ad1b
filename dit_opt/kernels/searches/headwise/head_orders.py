"""The token orders that a head may take, and the rows that a search samples."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.plan.orders import (
    VideoLayout,
    cut_evenly,
    invert_order,
    locate_tokens,
    order_columns,
    order_cubes,
    order_raster,
)
from dit_opt.kernels.plan.plan import BlockLayout, lay_blocks
from dit_opt.kernels.searches.mass.sampled import GOLDEN_RATIO, RowMeans, Sums, lay_sums
from dit_opt.kernels.searches.rainfusion.tables import choose_strip

# Names of the candidates, in the order of `HeadOrders.orders`.
ORDER_NAMES = ("raster", "columns", "cubes")


@dataclass(frozen=True, eq=False)
class HeadOrders:
    """The orders that heads choose from, and the rows that they are searched with.

    `orders` int64 [O, N], text behind the video in each. `blocks`: the same for every order. `rows`
    int64 [m]: sampled queries, in the model's own order. The mass of a query block is the mean over
    its sampled rows, or that of the nearest row if it has none: `means` are float32 weights
    [O, nq, m] on CPUs, and ranges of rows on GPUs. `sums`, on CPUs only, are of all key blocks.
    """

    orders: Tensor
    blocks: BlockLayout
    rows: Tensor
    means: Tensor | RowMeans
    sums: tuple[Sums, ...]


# Each grid has one entry for the CPU and one for the device.
@functools.lru_cache(maxsize=16)
def list_orders(
    layout: VideoLayout, block_q: int, block_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The candidates of `ORDER_NAMES` and their inverses, int64 [O, N] each; cached."""
    orders = torch.stack(
        [
            order_raster(layout),
            order_columns(layout, choose_strip(layout, block_q, block_k)),
            order_cubes(layout),
        ]
    )
    return orders.to(device), invert_order(orders).to(device)


@functools.lru_cache(maxsize=8)
def build_orders(
    layout: VideoLayout, block_q: int, block_k: int, cell: int, device: torch.device
) -> HeadOrders:
    """The orders of one grid, and one row out of `cell` tokens; cached.

    Raises ValueError for a cell that is no power of two, or an empty block.
    """
    if cell < 1 or cell & (cell - 1):
        raise ValueError(f"cell={cell} is no power of two; one row stands for so many tokens.")
    blocks = lay_blocks(layout.tokens, 0, layout.video_tokens, block_q, block_k, device)
    orders, inverses = list_orders(layout, block_q, block_k, torch.device("cpu"))
    rows = sample_cells(layout, cell)
    means = list_rows(inverses[:, rows], rows, layout.tokens, block_q)
    on_cpu = device.type == "cpu"
    return HeadOrders(
        orders=orders.to(device),
        blocks=blocks,
        rows=rows.to(device),
        means=weigh_rows(means, rows) if on_cpu else means.to(device),
        sums=lay_sums(orders, block_k, device) if on_cpu else (),
    )


def sample_cells(layout: VideoLayout, cell: int) -> Tensor:
    """One video token out of each box of about `cell` tokens, int64 [m], ascending.

    The token's position in the box follows a low-discrepancy sequence: rows at one position of all
    boxes would be at one position of all blocks.
    """
    sizes = [1, 1, 1]
    extents = (layout.frames, layout.height, layout.width)
    while sizes[0] * sizes[1] * sizes[2] < cell:
        # Doubles the thinnest axis that has room: w before h before t.
        axis = min((2, 1, 0), key=lambda a: (2 * sizes[a] > extents[a], sizes[a]))
        sizes[axis] *= 2
    places = locate_tokens(layout)
    box = torch.zeros(layout.video_tokens, dtype=torch.int64)
    for axis, (extent, size) in enumerate(zip(extents, sizes)):
        parts = cut_evenly(extent, size)
        box = box * int(parts[-1] + 1) + parts[places[:, axis]]
    members = box.argsort(stable=True)
    counts = box.bincount()
    first = counts.cumsum(0) - counts
    number = torch.arange(len(counts))
    drawn = ((number + 1) * GOLDEN_RATIO % 1 * counts).long().clamp(max=counts - 1)
    return members[first + drawn].sort().values + layout.video_start


def list_rows(places: Tensor, rows: Tensor, tokens: int, block_q: int) -> RowMeans:
    """The sampled rows of each query block of each order, or the nearest one if it has none.

    `rows` int64 [m] are at positions `places` int64 [O, m] of the orders.
    """
    places, ranks = places.sort(-1)
    starts = torch.arange(0, tokens + block_q, block_q).expand(len(places), -1).contiguous()
    bounds = torch.searchsorted(places, starts)
    first, last = bounds[:, :-1], bounds[:, 1:]
    middles = starts[:, :-1, None] + (block_q - 1) / 2
    nearest = (places[:, None] - middles).abs().argmin(-1)
    first = torch.where(first < last, first, nearest)
    return RowMeans(rows[ranks], first.int(), torch.maximum(last, first + 1).int())


def weigh_rows(means: RowMeans, rows: Tensor) -> Tensor:
    """The same means as weights of `rows`, which are ascending: float32 [O, nq, m]."""
    number = torch.arange(len(rows))
    held = (number >= means.first[..., None]) & (number < means.last[..., None])
    weights = held / held.sum(-1, keepdim=True)
    index = torch.searchsorted(rows, means.rows)[:, None].expand_as(weights)
    return torch.zeros_like(weights).scatter_(-1, index, weights)
