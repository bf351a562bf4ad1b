"""Grids that the numbers of packed tokens tell."""

from __future__ import annotations

import pytest
import torch

import dit_opt
from dit_opt.runtime import token_ids as module
from dit_opt.runtime.token_ids import find_grid, read_grid
from tests.trajectories import compiled, layouts_of, relative_error
from zoo.small import flux

OPTIONS = {"router": "rainfusion", "density": 0.6, "min_tokens": 0}


def number(t, h, w, first=0, step=1.0):
    """Positions [T * H * W, 3] of tokens."""
    axes = [first + step * torch.arange(float(n)) for n in (t, h, w)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


@pytest.mark.parametrize(
    ("positions", "grid"),
    [
        (number(3, 4, 5), (3, 4, 5)),
        (number(3, 4, 5).long(), (3, 4, 5)),
        (number(1, 4, 5), (1, 4, 5)),
        (number(3, 4, 5, first=7, step=-0.25), (3, 4, 5)),
        # time in columns of its own, twice, as the bounds of patches
        (torch.stack([number(3, 4, 5), number(3, 4, 5) + 0.5], -1), (3, 4, 5)),
        (number(3, 4, 5).half(), (3, 4, 5)),
        # pictures one behind the other
        (torch.cat([number(1, 4, 5), number(1, 4, 5) + torch.tensor([9.0, 0, 0])]), (2, 4, 5)),
    ],
)
def test_rows_columns_and_frames_are_read(positions, grid):
    assert find_grid(positions) == grid


def shuffled():
    return number(3, 4, 5)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]


def one_off():
    positions = number(3, 4, 5)
    positions[17, 2] += 1
    return positions


@pytest.mark.parametrize(
    "positions",
    [
        torch.zeros(60, 3),
        torch.arange(60.0)[:, None],
        torch.arange(60.0)[:, None].expand(60, 3),
        shuffled(),
        one_off(),
        # several sizes; a picture and text behind it
        torch.cat([number(1, 4, 5), number(1, 3, 7) + torch.tensor([9.0, 0, 0])]),
        torch.cat([number(1, 4, 5), torch.zeros(7, 3)]),
        # columns outermost, then rows that come twice
        torch.cat([number(1, 4, 5), number(1, 4, 5)]),
        torch.randn(60, 3),
        torch.randn(60, 128),
        torch.zeros(0, 3),
    ],
)
def test_numbers_that_are_no_rows_and_columns_tell_nothing(positions):
    assert find_grid(positions) is None


def test_a_tensor_is_read_once_until_it_is_written(monkeypatch):
    reads = []
    monkeypatch.setattr(module, "find_grid", lambda x: (reads.append(1), find_grid(x))[1])
    ids = torch.cat([torch.zeros(7, 3), number(1, 4, 5)]).T[None].contiguous()
    for _ in range(2):
        assert read_grid(ids, 2, 7, 27) == (1, 4, 5)
    assert len(reads) == 1
    ids[:, :, 7:] = number(1, 5, 4).T
    assert read_grid(ids, 2, 7, 27) == (1, 5, 4) and len(reads) == 2
    with torch.inference_mode():
        held = torch.cat([number(1, 4, 5)])
        assert read_grid(held, 0, 0, 20) == (1, 4, 5)


def starts():
    """The grid and the first latent token of all sites."""
    return {layout[:4] for layout in layouts_of()}


@pytest.mark.usefixtures("eager")
def test_landscape_and_portrait_of_as_many_tokens_are_told_apart():
    wide, high = flux(grid=(24, 32)), flux(grid=(32, 24))
    model = compiled(wide.model, dynamic=False, **OPTIONS)
    alone = compiled(flux(grid=(24, 32)).model, dynamic=False, **OPTIONS, grid=(1, 32, 24))
    first = wide(model)
    assert starts() == {(1, 24, 32, 7)}
    assert relative_error(high(model), high(alone)) < 1e-5
    assert starts() == {(1, 24, 32, 7), (1, 32, 24, 7)}
    assert relative_error(wide(model), first) == 0
    assert torch.isfinite(first).all()


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_reads_them_too():
    tiny = flux(grid=(24, 32))
    found = dit_opt.explain(tiny.model, **tiny.inputs, options=OPTIONS)
    layouts = [d.layout for d in found.decisions if d.replaced]
    assert layouts and all(str(x.grid) == "(1, 24, 32)" for x in layouts)
    assert {x.grid_source for x in layouts} == {"positions"}


@pytest.mark.usefixtures("eager")
def test_numbers_that_tell_no_grid_leave_the_order_of_the_model():
    tiny = flux(grid=(24, 32))
    tiny.inputs["img_ids"][5, 2] = 100.0
    model = compiled(tiny.model, dynamic=False, **OPTIONS | {"router": "headwise"})
    assert torch.isfinite(tiny(model)).all()
    # a row of tokens
    assert starts() == {(1, 1, 24 * 32, 7)}
