"""RainFusion's candidates for one grid: token orders, block lists and densities on the device.

They depend on shapes alone, so they are built once per grid. A call only indexes them, so that a
choice for each head needs no host synchronisation.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.plan.orders import (
    VideoLayout,
    invert_order,
    order_columns,
    order_lattice,
    order_raster,
)
from dit_opt.kernels.plan.plan import BlockLayout, lay_blocks, list_kept
from dit_opt.kernels.searches.mass.sampled import Sums, lay_sums
from dit_opt.kernels.searches.rainfusion.patterns import (
    DENSE,
    HeadKind,
    Pattern,
    box_blocks,
    list_patterns,
)

# The index of each kind's order in `Tables.orders`.
_ORDER_OF = {
    HeadKind.DENSE: 0,
    HeadKind.SPATIAL: 0,
    HeadKind.TEMPORAL: 1,
    HeadKind.TEXTURAL: 2,
}

# The highest strip tried for the columns order, and the number of query blocks it is tried on.
_MAX_STRIP = 16
_STRIP_QUERY_BLOCKS = 64


@dataclass(frozen=True, eq=False)
class Tables:
    """The C candidates of one grid, by rising density; the last one is dense, in raster order.

    `orders`, `inverses` int64 [3, N]: raster, columns, lattice. `order_of` int64 [C]: the order of
    each candidate. `counts` int32 [C, nq], `indices` int32 [C, nq, nk]: key-block lists, ascending
    in the first `counts` entries. `density` float32 [C]: kept share of the score matrix in real
    tokens, as executed. `sums`: the key blocks of all orders.

    The lists take 4 * C * nq * nk bytes: 101 MB for 110k tokens, 17 candidates and blocks of 128
    x 64.
    """

    layout: VideoLayout
    blocks: BlockLayout
    patterns: tuple[Pattern, ...]
    orders: Tensor
    inverses: Tensor
    order_of: Tensor
    counts: Tensor
    indices: Tensor
    density: Tensor
    sums: tuple[Sums, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What each candidate is called: "temporal 1x1", "textural 4", "dense"..."""
        return tuple(pattern.name for pattern in self.patterns)


@functools.lru_cache(maxsize=8)
def build_tables(
    frames: int,
    height: int,
    width: int,
    video_start: int,
    tokens: int,
    block_q: int,
    block_k: int,
    device: torch.device,
) -> Tables:
    """The candidates for a sequence of `tokens` whose video is row-major from `video_start` on.

    Cached. Candidates that keep everything, or the same blocks as another one of their order, are
    left out. Raises ValueError when the grid does not fit into the sequence or a block is empty.
    """
    layout = VideoLayout(frames, height, width, video_start, tokens)
    cpu, video_tokens = torch.device("cpu"), layout.video_tokens
    blocks = lay_blocks(tokens, video_start, video_tokens, block_q, block_k, cpu)
    orders = [
        order_raster(layout),
        order_columns(layout, choose_strip(layout, block_q, block_k)),
        order_lattice(layout),
    ]
    query_boxes = [box_blocks(layout, order, block_q) for order in orders]
    key_boxes = [box_blocks(layout, order, block_k) for order in orders]
    areas = torch.outer(blocks.query_sizes.double(), blocks.key_sizes.double())

    lists: dict[tuple[int, bytes], tuple[float, Pattern, Tensor, Tensor]] = {}
    for pattern in (*list_patterns(layout), DENSE):
        order = _ORDER_OF[pattern.kind]
        mask = pattern.lift(query_boxes[order], key_boxes[order])
        if pattern is not DENSE and mask.all():
            continue
        density = (areas * mask).sum().item() / tokens**2
        # Of patterns that touch the same blocks the widest gives the name: it comes last.
        lists[order, mask.numpy().tobytes()] = (density, pattern, *list_kept(mask))
    entries = sorted(lists.values(), key=lambda entry: entry[0])
    stacked = torch.stack(orders)
    return Tables(
        layout=layout,
        blocks=blocks,
        patterns=tuple(entry[1] for entry in entries),
        orders=stacked.to(device),
        inverses=invert_order(stacked).to(device),
        order_of=torch.tensor([_ORDER_OF[entry[1].kind] for entry in entries], device=device),
        counts=torch.stack([entry[2] for entry in entries]).to(device),
        indices=torch.stack([entry[3] for entry in entries]).to(device),
        density=torch.tensor([entry[0] for entry in entries], device=device),
        sums=lay_sums(stacked, block_k, device),
    )


def choose_strip(layout: VideoLayout, block_q: int, block_k: int) -> int:
    """The strip height of the columns order with which Temporal patterns keep the fewest blocks.

    It is tried on some of the query blocks. A strip whose columns do not fit into a query block is
    never the best.
    """
    temporal = [p for p in list_patterns(layout) if p.kind is HeadKind.TEMPORAL]
    highest = max(1, min(layout.height, block_q // layout.frames, _MAX_STRIP))

    def measure_kept(strip: int) -> float:
        order = order_columns(layout, strip)
        queries = box_blocks(layout, order, block_q).take(_STRIP_QUERY_BLOCKS)
        keys = box_blocks(layout, order, block_k)
        # A product, since one more block is worse for a narrow window than for a wide one.
        return math.prod(pattern.lift(queries, keys).float().mean().item() for pattern in temporal)

    return min(range(1, highest + 1), key=measure_kept)
