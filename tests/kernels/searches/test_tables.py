"""The candidates of a grid: ascending lists, true densities, and nothing that keeps everything."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.reference import expand_blocks, expand_lists
from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.rainfusion.patterns import DENSE, HeadKind
from dit_opt.kernels.searches.rainfusion.tables import build_tables, choose_strip

CPU = torch.device("cpu")
GRIDS = [(4, 8, 8, 0, 256), (5, 9, 7, 11, 340), (1, 16, 16, 0, 256), (9, 6, 10, 0, 559)]


@pytest.mark.parametrize("grid", GRIDS)
def test_densities_count_real_tokens_and_rise_to_dense(grid):
    tokens = grid[-1]
    tables = build_tables(*grid, 32, 16, CPU)
    masks = expand_lists(tables.counts, tables.indices, tables.indices.shape[-1])
    masks = expand_blocks(masks, tokens, tokens, 32, 16)
    torch.testing.assert_close(tables.density, masks.float().mean((1, 2)), rtol=1e-6, atol=0)
    assert (tables.density.diff() >= 0).all()
    assert tables.names[-1] == "dense" and tables.density[-1] == 1
    assert len(tables.names) > 4 and (tables.density[:-1] < 1).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_text_keys_are_kept_and_text_queries_see_everything(grid):
    tables = build_tables(*grid, 32, 16, CPU)
    masks = expand_lists(tables.counts, tables.indices, tables.indices.shape[-1])
    tokens = expand_blocks(masks, grid[-1], grid[-1], 32, 16)
    video_tokens = tables.layout.video_tokens
    assert tokens[:, video_tokens:].all() and tokens[:, :, video_tokens:].all()


def test_candidates_of_one_order_differ():
    tables = build_tables(4, 8, 8, 0, 256, 32, 16, CPU)
    seen = {
        (order, counts.numpy().tobytes(), indices.numpy().tobytes())
        for order, counts, indices in zip(
            tables.order_of.tolist(), tables.counts, tables.indices, strict=True
        )
    }
    assert len(seen) == len(tables.names)


def test_a_grid_of_one_block_leaves_only_dense():
    tables = build_tables(2, 3, 4, 0, 24, 128, 64, CPU)
    assert tables.patterns == (DENSE,)


def test_each_kind_has_its_order():
    tables = build_tables(4, 8, 8, 5, 270, 32, 16, CPU)
    kinds = [pattern.kind for pattern in tables.patterns]
    order_of = dict(zip(kinds, tables.order_of.tolist(), strict=True))
    assert order_of == {
        HeadKind.DENSE: 0,
        HeadKind.SPATIAL: 0,
        HeadKind.TEMPORAL: 1,
        HeadKind.TEXTURAL: 2,
    }
    each = torch.arange(3)[:, None]
    assert torch.equal(tables.orders[each, tables.inverses], torch.arange(270).expand(3, -1))


@pytest.mark.parametrize("grid, strip", [((1, 64, 64), 8), ((4, 32, 32), 4), ((16, 16, 16), 2)])
def test_strips_make_blocks_square_in_the_frame(grid, strip):
    assert choose_strip(VideoLayout(*grid, 0, 4096), 128, 64) == strip


def test_tables_are_built_once_per_grid():
    again = [build_tables(3, 4, 5, 0, 60, 32, 16, CPU) for _ in range(2)]
    assert again[0] is again[1]


def test_empty_blocks_are_refused():
    with pytest.raises(ValueError, match="Blocks of 0 x 16"):
        build_tables(3, 4, 5, 0, 60, 0, 16, CPU)
