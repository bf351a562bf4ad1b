"""Orders hold every token once, and the rows of a search stand for all of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_opt.kernels.plan.orders import VideoLayout, invert_order, locate_tokens
from dit_opt.kernels.searches.headwise.head_orders import (
    build_orders,
    list_orders,
    list_rows,
    sample_cells,
    weigh_rows,
)

from .scenes import CPU


def test_one_row_is_drawn_from_each_box_and_every_block_gets_some():
    layout = VideoLayout(16, 16, 16, 7, 4096 + 20)
    rows = sample_cells(layout, 16)
    assert len(rows) == 256 and bool((rows.diff() > 0).all())
    positions = locate_tokens(layout)[rows - 7]
    # No place in a box is preferred.
    for axis in range(3):
        assert (positions[:, axis] % 2).float().mean() == pytest.approx(0.5, abs=0.1)
    for order in list_orders(layout, 128, 64, CPU)[0]:
        blocks = (invert_order(order)[rows] // 128).bincount()
        assert 3 <= blocks[:32].min() and blocks.max() <= 16


def test_a_block_without_a_row_is_given_the_nearest():
    layout = VideoLayout(1, 1, 60, 0, 100)
    orders = build_orders(layout, 16, 16, 32, CPU)
    assert torch.equal(orders.means.sum(-1), torch.ones(3, 7))


def test_listed_rows_are_the_weighted_ones_of_each_block():
    layout = VideoLayout(2, 4, 7, 3, 61)
    _, inverses = list_orders(layout, 8, 8, CPU)
    rows = sample_cells(layout, 8)
    places = inverses[:, rows]
    means = list_rows(places, rows, 61, 8)
    weights = weigh_rows(means, rows)
    assert torch.equal(build_orders(layout, 8, 8, 8, CPU).means, weights)
    lengths = set()
    for order, block in itertools.product(range(3), range(8)):
        listed = means.rows[order, means.first[order, block] : means.last[order, block]]
        assert sorted(listed.tolist()) == rows[weights[order, block] > 0].tolist()
        own = places[order] // 8 == block
        if own.any():
            assert sorted(listed.tolist()) == rows[own].tolist()
        else:
            distance = (places[order] - (block * 8 + 3.5)).abs()
            assert distance[rows == listed].item() == distance.min()
        lengths.add(len(listed) if own.any() else 0)
    # several rows, one, and none
    assert {0, 1} < lengths
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8))


def test_a_cell_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="cell=3 is no power of two"):
        build_orders(VideoLayout(2, 4, 4, 0, 32), 16, 16, 3, CPU)
