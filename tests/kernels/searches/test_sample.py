"""Sampled rows are video rows, spread over the grid, and know their own block lists."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.rainfusion.sample import count_rows, draw_sample, place_rows
from dit_opt.kernels.searches.rainfusion.tables import build_tables


@pytest.mark.parametrize(
    "video, expected", [((1, 4, 4), 32), ((16, 16, 16), 32), ((8, 27, 30), 50), ((21, 30, 52), 64)]
)
def test_the_number_of_rows_follows_the_video(video, expected):
    tokens = video[0] * video[1] * video[2]
    assert count_rows(VideoLayout(*video, 0, tokens)) == expected


@pytest.mark.parametrize("video", [(16, 16, 16), (8, 16, 32), (4, 32, 32), (1, 64, 64)])
def test_rows_are_spread_over_every_axis(video):
    layout = VideoLayout(*video, 100, 100 + 4096 + 50)
    rows = torch.tensor(place_rows(layout, 32)) - 100
    assert rows.min() >= 0 and rows.max() < 4096
    frame = video[1] * video[2]
    # Periods of the grid divide the sampling distance here; plain strides would stay in one column.
    assert len((rows % video[2]).unique()) >= min(video[2], 32) * 0.5
    assert len((rows % frame // video[2]).unique()) >= min(video[1], 32) * 0.5
    assert len((rows // frame).unique()) == min(video[0], 32)
    if video[0] > 1:
        assert (rows < frame).sum() >= 4


def test_few_tokens_give_few_rows():
    assert len(place_rows(VideoLayout(1, 2, 3, 0, 9), 32)) == 6


def test_kept_is_the_list_of_the_rows_own_block():
    tables = build_tables(4, 8, 8, 3, 270, 32, 16, torch.device("cpu"))
    sample = draw_sample(tables, 20)
    key_blocks = tables.indices.shape[-1]
    for i, row in enumerate(sample.rows.tolist()):
        for c, order in enumerate(tables.order_of.tolist()):
            block = tables.inverses[order, row] // 32
            listed = tables.indices[c, block, : tables.counts[c, block]] + order * key_blocks
            assert sample.kept[i, c].nonzero().flatten().tolist() == listed.tolist()
