from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.plan.orders import VideoLayout, order_cubes
from dit_opt.kernels.token_order import gather_tokens, make_cube_order, scatter_tokens


def make(batch, heads, key_heads, tokens, dim, layout):
    torch.manual_seed(0)
    x = torch.randn(batch, key_heads, tokens, dim)
    if layout == "bnhd":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        x = torch.randn(batch, key_heads, tokens, 2 * dim)[..., ::2]
    orders = torch.stack([torch.randperm(tokens) for _ in range(batch * heads)])
    return x, orders.view(batch, heads, tokens)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
def test_gather_takes_the_rows_of_the_shared_head(layout, heads, key_heads):
    x, rows = make(2, heads, key_heads, 13, 8, layout)
    out = torch.ops.ditopt.gather_tokens_v1(x, rows)
    for b in range(2):
        for h in range(heads):
            assert torch.equal(out[b, h], x[b, h // (heads // key_heads), rows[b, h]])


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_scatter_undoes_gather_in_the_layout_that_models_flatten(layout):
    x, rows = make(2, 3, 3, 17, 4, layout)
    out = scatter_tokens(gather_tokens(x, rows), rows.argsort(-1))
    assert torch.equal(out, x)
    assert out.transpose(1, 2).is_contiguous()


def test_gather_bias_follows_each_head():
    _, rows = make(2, 3, 3, 11, 4, "bhnd")
    bias = torch.randn(2, 1, 11)
    out = torch.ops.ditopt.gather_bias_v1(bias, rows)
    assert torch.equal(out[1, 2], bias[1, 0, rows[1, 2]])


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_opcheck(layout):
    x, rows = make(2, 4, 2, 13, 8, layout)
    torch.library.opcheck(torch.ops.ditopt.gather_tokens_v1.default, (x, rows))
    y, rows = make(2, 3, 3, 13, 8, layout)
    torch.library.opcheck(torch.ops.ditopt.scatter_tokens_v1.default, (y, rows))
    bias = torch.randn(1, 1, 13)
    torch.library.opcheck(torch.ops.ditopt.gather_bias_v1.default, (bias, rows))


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
