"""The query rows that recognition samples, and what each candidate keeps for them.

A few exact rows say how much softmax mass a pattern holds. Their distance must not be a multiple of
the grid's width, or all would be in one column of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.mass.sampled import GOLDEN_RATIO
from dit_opt.kernels.searches.rainfusion.tables import Tables

# Video tokens per sampled row; the bounds keep the estimate stable and cheap.
_TOKENS_PER_ROW = 128
_MIN_ROWS, _MAX_ROWS = 32, 64

# Share of the rows in the first frame, RainFusion's local sample.
_LOCAL_SHARE = 1 / 8


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample of m query rows.

    `rows` int64 [m]: token positions in the model's own order.
    `kept` float32 [m, C, orders * nk]: 1 where a candidate's list for the row's query block has
    the key block; block j of order o is at o * nk + j, as in `Tables.sums`.
    """

    rows: Tensor
    kept: Tensor


def count_rows(layout: VideoLayout) -> int:
    """Rows that recognition samples by default: one in 128 video tokens, between 32 and 64."""
    return min(max(layout.video_tokens // _TOKENS_PER_ROW, _MIN_ROWS), _MAX_ROWS)


def place_rows(layout: VideoLayout, count: int) -> list[int]:
    """Token positions of `count` video rows, an eighth of them in the first frame.

    One row in each of `count` equal intervals of tokens, at a multiple of the golden ratio inside
    it, so that rows share no period of the grid.
    """
    count = min(count, layout.video_tokens)
    local = max(1, int(count * _LOCAL_SHARE)) if layout.frames > 1 else 0
    first_frame = _spread(local, layout.height * layout.width)
    positions = first_frame + _spread(count - local, layout.video_tokens)
    return [layout.video_start + position for position in positions]


@functools.lru_cache(maxsize=8)
def draw_sample(tables: Tables, count: int) -> Sample:
    """A sample of `count` rows, fewer when the video is shorter; cached beside its tables."""
    device = tables.orders.device
    rows = torch.tensor(place_rows(tables.layout, count), device=device)
    query_blocks = tables.inverses[:, rows][tables.order_of] // tables.blocks.block_q
    candidates = torch.arange(len(tables.order_of), device=device)[:, None]
    lists = (tables.counts, tables.indices)
    counts, indices = (x[candidates, query_blocks] for x in lists)
    kept = expand_lists(counts, indices, tables.indices.shape[-1])
    orders = torch.arange(len(tables.orders), device=device)
    kept = kept[:, :, None] & (orders == tables.order_of[:, None])[:, None, :, None]
    return Sample(rows, kept.flatten(2).transpose(0, 1).float().contiguous())


def _spread(count: int, length: int) -> list[int]:
    return [int((i + (i + 1) * GOLDEN_RATIO % 1) * length / count) for i in range(count)]
