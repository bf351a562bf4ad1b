"""Orders hold every token once, and the rows of a search stand for all of them."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.routers.head_orders import build_orders, list_orders, sample_cells
from dit_opt.kernels.routers.orders import VideoLayout, invert_order, locate_tokens
from dit_opt.kernels.routers.sampled_mass import lay_means

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


def test_means_in_lists_are_those_of_the_weights():
    torch.manual_seed(0)
    # seven rows of two video frames: some blocks have several, some none
    orders = build_orders(VideoLayout(2, 4, 7, 3, 61), 8, 8, 8, CPU)
    weights = orders.means
    kinds, blocks, rows = weights.shape
    lines = torch.randn(kinds * rows, 5)
    means = lay_means(weights, CPU)
    found = torch.zeros(kinds * blocks, 5)
    for block, part in enumerate(means.gather.tensor_split(means.offsets[1:])):
        shares = means.shares.tensor_split(means.offsets[1:])[block]
        found[block] = shares @ lines[part]
    expected = weights @ lines.view(kinds, rows, 5)
    torch.testing.assert_close(found.view(kinds, blocks, 5), expected)


def test_a_cell_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="cell=3 is no power of two"):
        build_orders(VideoLayout(2, 4, 4, 0, 32), 16, 16, 3, CPU)
