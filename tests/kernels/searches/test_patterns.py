"""Block lists are supersets of their patterns, and no larger where blocks are boxes."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_opt.kernels.plan.orders import (
    VideoLayout,
    order_columns,
    order_lattice,
    order_raster,
)
from dit_opt.kernels.searches.rainfusion.patterns import (
    DENSE,
    HeadKind,
    Pattern,
    box_blocks,
    list_patterns,
)

ORDERS = {
    HeadKind.SPATIAL: order_raster,
    HeadKind.TEMPORAL: lambda layout: order_columns(layout, 2),
    HeadKind.TEXTURAL: order_lattice,
}


def keeps(pattern, query, key):
    """RainFusion's three sets, written out for one pair of (t, h, w)."""
    dt, dh, dw = (abs(a - b) for a, b in zip(query, key, strict=True))
    if pattern.kind is HeadKind.SPATIAL:
        return dt <= pattern.reach[0]
    if pattern.kind is HeadKind.TEMPORAL:
        return dh <= pattern.reach[1] and dw <= pattern.reach[2]
    tau = pattern.lattice
    return any(key[1] % tau == k and key[2] % tau == k for k in range(tau))


def lift_by_hand(pattern, layout, order, block_q, block_k):
    grid = itertools.product(*map(range, (layout.frames, layout.height, layout.width)))
    where = dict(enumerate(grid, start=layout.video_start))
    tokens = [where.get(token) for token in order.tolist()]

    def split(block):
        return [tokens[i : i + block] for i in range(0, layout.tokens, block)]

    def touches(queries, keys):
        if None in queries or None in keys:
            return True
        return any(keeps(pattern, q, k) for q in queries for k in keys)

    return torch.tensor([[touches(q, k) for k in split(block_k)] for q in split(block_q)])


@pytest.mark.parametrize(
    "layout",
    [
        VideoLayout(3, 5, 7, 4, 115),
        VideoLayout(7, 3, 4, 0, 84),
        VideoLayout(1, 8, 11, 0, 90),
        VideoLayout(5, 1, 9, 3, 50),
    ],
)
@pytest.mark.parametrize("block_q, block_k", [(16, 8), (5, 11)])
def test_lists_hold_at_least_what_the_pattern_keeps(layout, block_q, block_k):
    patterns = list_patterns(layout)
    assert {pattern.kind for pattern in patterns} >= {HeadKind.TEXTURAL}
    for pattern in patterns:
        order = ORDERS[pattern.kind](layout)
        lifted = pattern.lift(
            box_blocks(layout, order, block_q), box_blocks(layout, order, block_k)
        )
        by_hand = lift_by_hand(pattern, layout, order, block_q, block_k)
        assert (lifted | ~by_hand).all(), pattern.name
        # Raster blocks are contiguous in t, and levels are sets, so these two are exact.
        if pattern.kind is not HeadKind.TEMPORAL:
            assert torch.equal(lifted, by_hand), pattern.name


def test_temporal_lists_are_exact_where_blocks_are_boxes():
    layout = VideoLayout(4, 8, 6, 0, 192)
    order = order_columns(layout, 2)
    for rows, columns in itertools.product(range(4), range(3)):
        pattern = Pattern(HeadKind.TEMPORAL, (None, rows, columns))
        lifted = pattern.lift(box_blocks(layout, order, 16), box_blocks(layout, order, 8))
        assert torch.equal(lifted, lift_by_hand(pattern, layout, order, 16, 8))


def test_tokens_are_boxes_of_size_one():
    layout = VideoLayout(3, 4, 5, 0, 60)
    tokens = box_blocks(layout, order_raster(layout), 1)
    for pattern in list_patterns(layout):
        by_hand = lift_by_hand(pattern, layout, order_raster(layout), 1, 1)
        assert torch.equal(pattern.lift(tokens, tokens), by_hand)
    assert DENSE.lift(tokens, tokens).all()


def test_bands_rise_from_narrow_to_wide_without_repeats():
    patterns = list_patterns(VideoLayout(16, 16, 16, 0, 4096))
    assert [pattern.name for pattern in patterns] == [
        *("spatial 0", "spatial 1", "spatial 2", "spatial 3", "spatial 4", "spatial 6"),
        *("temporal 1x1", "temporal 2x2", "temporal 4x4", "temporal 5x5", "temporal 6x6"),
        *("textural 8", "textural 4", "textural 2"),
    ]
    assert DENSE.name == "dense"


def test_one_frame_has_no_spatial_pattern():
    patterns = list_patterns(VideoLayout(1, 16, 16, 0, 256))
    assert {p.kind for p in patterns} == {HeadKind.TEMPORAL, HeadKind.TEXTURAL}
