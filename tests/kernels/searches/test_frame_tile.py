"""Frame tiles: the diagonal, evenly spread references, text, and the most that a density buys."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.reference import expand_blocks, expand_lists
from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.plan.plan import Plan, lay_blocks
from dit_opt.kernels.searches.frame_tile import build_tiles

from .scenes import CPU, check_plan

operator = torch.ops.ditopt.frame_tile_plan_v1

# T, H, W, video_start, N: none, on both sides, after; odd axes throughout.
GRIDS = [(6, 5, 7, 0, 210), (5, 3, 9, 17, 161), (7, 5, 5, 0, 190), (1, 9, 11, 3, 110)]


def keep_tokens(layout, references):
    """The pattern between tokens, bool [N, N]."""
    frame = torch.full((layout.tokens,), -1)
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    frame[video] = torch.arange(layout.video_tokens) // (layout.height * layout.width)
    middle = [int((i + 0.5) / references * layout.frames) for i in range(references)]
    chosen = torch.isin(frame, torch.tensor(middle, dtype=torch.int64))
    text = frame < 0
    return (frame[:, None] == frame) | chosen | text[:, None] | text


@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_blocks_are_those_that_the_tiles_touch_and_references_the_most(grid, density):
    layout = VideoLayout(*grid)
    tiles = build_tiles(layout, density, 32, 16, CPU)

    def cover(references):
        tokens = keep_tokens(layout, references)
        rows = torch.stack([x.any(0) for x in tokens.split(32)])
        return torch.stack([x.any(1) for x in rows.split(16, 1)], 1)

    mask = expand_lists(tiles.counts, tiles.indices, tiles.indices.shape[-1])
    assert torch.equal(mask, cover(tiles.references))
    realised = expand_blocks(mask, layout.tokens, layout.tokens, 32, 16).double().mean().item()
    assert tiles.density == pytest.approx(realised, abs=1e-9)
    assert realised <= density or tiles.references == 0
    if tiles.references < layout.frames:
        more = expand_blocks(cover(tiles.references + 1), layout.tokens, layout.tokens, 32, 16)
        assert more.double().mean() > density


def test_every_head_gets_a_copy_of_the_same_lists():
    layout = VideoLayout(*GRIDS[1])
    plan = Plan(*operator(torch.zeros(2, 3, 161, 8), 0.7, *GRIDS[1][:4], 32, 16))
    check_plan(plan, lay_blocks(161, 17, 135, 32, 16, CPU))
    assert plan.counts.shape == (1, 3, 6) and plan.recall.isnan().all()
    plan.indices.zero_()
    assert build_tiles(layout, 0.7, 32, 16, CPU).indices.any()


def test_opcheck():
    arguments = (torch.zeros(2, 3, 161, 8), 0.7, *GRIDS[1][:4], 32, 16)
    results = torch.library.opcheck(
        operator.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert set(results.values()) == {"SUCCESS"}


def test_a_head_that_may_drop_nothing_gets_every_block():
    arguments = (torch.zeros(2, 3, 161, 8), 0.7, *GRIDS[1][:4], 32, 16)
    boost = torch.ones(2, 3)
    boost[0, 1], boost[1, 2] = torch.inf, 4.0
    plain, found = operator(*arguments), operator(*arguments, boost)
    dense = boost == torch.inf
    assert (found[0][dense] == 11).all() and (found[3][dense] == 1).all()
    assert torch.equal(found[1][0, 1, 0], torch.arange(11, dtype=torch.int32))
    for x, y in zip(found, plain, strict=True):
        others = y.expand_as(x)[~dense]
        torch.testing.assert_close(x[~dense], others, equal_nan=True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator.default, (*arguments, boost), test_utils=checks)


def test_a_density_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"density is 0\.0"):
        build_tiles(VideoLayout(*GRIDS[0]), 0.0, 32, 16, CPU)
