"""Token orders are permutations with text last, and each gathers what its pattern keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_opt.kernels.plan.orders import (
    VideoLayout,
    invert_order,
    locate_tokens,
    measure_lattice,
    order_columns,
    order_cubes,
    order_lattice,
    order_raster,
)

sides = st.integers(1, 9)
layouts = st.builds(
    lambda t, h, w, before, after: VideoLayout(t, h, w, before, before + t * h * w + after),
    sides,
    sides,
    sides,
    st.integers(0, 5),
    st.integers(0, 5),
)


@settings(max_examples=60)
@given(layout=layouts, strip=st.integers(1, 5))
def test_every_order_is_a_permutation_with_text_last_and_in_sequence(layout, strip):
    end = layout.video_start + layout.video_tokens
    text = [*range(layout.video_start), *range(end, layout.tokens)]
    cubes = order_cubes(layout, (strip, 4, 4))
    others = (order_raster(layout), order_columns(layout, strip), order_lattice(layout))
    for order in (cubes, order_cubes(layout), *others):
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(layout.tokens))
        assert order[layout.video_tokens :].tolist() == text
        inverse = invert_order(order)
        assert torch.equal(order[inverse], torch.arange(layout.tokens))
        assert torch.equal(inverse[order], torch.arange(layout.tokens))


def test_raster_keeps_the_video_as_it_is():
    layout = VideoLayout(2, 3, 5, 4, 40)
    assert order_raster(layout)[:30].tolist() == list(range(4, 34))


@settings(max_examples=40)
@given(layout=layouts, strip=st.integers(1, 5))
def test_columns_run_through_all_frames_before_the_next_column(layout, strip):
    video = order_columns(layout, strip)[: layout.video_tokens] - layout.video_start
    t, h, w = locate_tokens(layout)[video].unbind(1)
    columns = list(zip((h // strip).tolist(), w.tolist(), strict=True))
    visits = [c for i, c in enumerate(columns) if i == 0 or columns[i - 1] != c]
    assert len(visits) == len(set(columns))
    for before, after in itertools.pairwise(visits):
        assert abs(before[0] - after[0]) + abs(before[1] - after[1]) == 1
    same = torch.tensor([a == b for a, b in itertools.pairwise(columns)], dtype=bool)
    assert (t.diff()[same] >= 0).all()


@settings(max_examples=40)
@given(layout=layouts)
def test_lattice_puts_each_checkerboard_in_a_prefix(layout):
    video = order_lattice(layout)[: layout.video_tokens] - layout.video_start
    _, h, w = locate_tokens(layout)[video].unbind(1)
    for step in (8, 4, 2):
        inside = torch.tensor(
            [
                any(a % step == k and b % step == k for k in range(step))
                for a, b in zip(h, w, strict=True)
            ]
        )
        assert inside[: inside.sum()].all()
        assert torch.equal(measure_lattice(locate_tokens(layout)[video]) >= step, inside)


def test_lattice_prefixes_are_an_eighth_a_quarter_and_a_half():
    level = measure_lattice(locate_tokens(VideoLayout(3, 16, 24, 0, 3 * 16 * 24)))
    assert [(level >= step).float().mean().item() for step in (8, 4, 2)] == [1 / 8, 1 / 4, 1 / 2]


@settings(max_examples=40)
@given(layout=layouts)
def test_cubes_follow_each_other_and_blocks_stay_small(layout):
    video = order_cubes(layout)[: layout.video_tokens] - layout.video_start
    positions = locate_tokens(layout)[video]
    # A step goes to a neighbouring column of the same or of the next beam.
    assert (positions.diff(dim=0)[:, 2].abs() <= 1).all()
    for block in positions.split(64):
        extent = block.amax(0) - block.amin(0) + 1
        # A block at a turn lies in two beams, and around the next layer in four.
        assert extent.prod() <= 8 * 64


def test_blocks_are_cubes_and_pairs_of_blocks_are_boxes_where_axes_divide():
    layout = VideoLayout(8, 12, 16, 3, 3 + 8 * 12 * 16)
    positions = locate_tokens(layout)[order_cubes(layout)[: 8 * 12 * 16] - 3]
    for size, box in ((64, [4, 4, 4]), (128, [4, 4, 8])):
        for block in positions.split(size):
            assert (block.amax(0) - block.amin(0) + 1).tolist() == box
    with pytest.raises(ValueError, match=r"cube \(4, 0, 4\) has an empty axis"):
        order_cubes(layout, (4, 0, 4))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((2, 3, 4, 0, 23), "multiplies to 24 tokens"),
        ((2, 3, 4, 5, 28), "only 23 of the 28 tokens"),
        ((2, 0, 4, 0, 24), r"\(2, 0, 4\) has an empty axis"),
        ((2, 3, 4, -1, 24), "video_start is -1"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        VideoLayout(*arguments)
