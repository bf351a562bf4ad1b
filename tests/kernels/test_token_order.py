from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.routers.orders import VideoLayout, order_cubes
from dit_opt.kernels.token_order import make_cube_order


@pytest.mark.parametrize("start, text", [(0, 0), (0, 5), (7, 0), (7, 5)])
def test_the_cube_order_leaves_text_where_it_is(start, text):
    grid, tokens = (3, 4, 5), start + 60 + text
    rows, inverse = make_cube_order(torch.empty(0), *grid, start, tokens)
    assert torch.equal(rows[inverse], torch.arange(tokens))
    assert torch.equal(rows[:start], torch.arange(start))
    assert torch.equal(rows[start + 60 :], torch.arange(start + 60, tokens))
    video = order_cubes(VideoLayout(*grid, 0, 60))
    assert torch.equal(rows[start : start + 60], video + start)
    rows.zero_()
    again, _ = make_cube_order(torch.empty(0), *grid, start, tokens)
    assert torch.equal(again.sort().values, torch.arange(tokens))


def test_opcheck_of_the_cube_order():
    torch.library.opcheck(torch.ops.ditopt.cube_order_v1.default, (torch.empty(2), 3, 4, 5, 7, 70))
