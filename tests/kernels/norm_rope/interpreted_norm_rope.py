"""Cases for the Triton kernels of the attention prologue; `test_triton.py` runs them in a process
of their own, where TRITON_INTERPRET is set before the kernels are defined."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from dit_opt.kernels.norm_rope.contract import Arguments
from dit_opt.kernels.norm_rope.impl.triton import prologue as kernels
from dit_opt.kernels.norm_rope.reference import compute_plainly

from .scenes import LAYOUTS, SCENES, Scene, make_inputs

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ERRORS = {torch.float32: 5e-6, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever is not written shows, also of what one kernel writes for the next."""
    new_empty = torch.Tensor.new_empty

    def new_poisoned(*arguments, **options):
        made = new_empty(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_poisoned)


def assert_matches(arguments):
    call = Arguments(*arguments)
    found, expected = kernels.compute(call), compute_plainly(call)
    assert_close(found, expected)
    assert found.stride() == expected.stride()


def assert_close(found, expected):
    error = ERRORS[found.dtype]
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_matches_the_reference(scene, dtype):
    assert_matches(make_inputs(scene, dtype, DEVICE))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["head", "across"])
def test_layouts(layout, norm):
    scene = Scene(batch=1, dim=128, tokens=19, rotated=19, norm=norm, layout=layout)
    assert_matches(make_inputs(scene, torch.float16, DEVICE))


@pytest.mark.parametrize("rows", [None, "shared", "per head"])
@pytest.mark.parametrize("norm", ["head", "across"])
def test_several_heads_of_a_program(norm, rows, monkeypatch):
    # groups of two heads and of one
    monkeypatch.setattr(kernels, "_MAX_GROUP", 2)
    monkeypatch.setattr(kernels, "_LEAST_PROGRAMS", 1)
    assert kernels.choose_group(3, 2, rows == "per head") == (1 if rows == "per head" else 2)
    assert_matches(make_inputs(Scene(norm=norm, rows=rows), device=DEVICE))


def test_groups_leave_enough_programs():
    assert kernels.choose_group(24, 10_000, False) == 8
    # 12 heads make two groups that are as long, not 8 and 4
    assert kernels.choose_group(12, 10_000, False) == 6
    assert kernels.choose_group(24, 10, False) == 1
    assert kernels.choose_group(1, 10_000, False) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_tables_of_other_dtypes(dtype):
    x, weight, eps, across, cos, sin, *others = make_inputs(Scene(), device=DEVICE)
    arguments = (x, weight.half(), eps, across, cos.to(dtype), sin.to(dtype), *others)
    assert_matches(arguments)


def test_a_wrong_order_pair_or_table_differs():
    scene = Scene(rows="per head")
    x, weight, eps, across, cos, sin, halves, start, rows = make_inputs(scene, device=DEVICE)
    right = (x, weight, eps, across, cos, sin, halves, start, rows)
    found = kernels.compute(Arguments(*right))
    assert_close(found, compute_plainly(Arguments(*right)))
    for wrong in (
        (x, weight, eps, across, cos, sin, halves, start, rows.argsort(-1)),
        (x, weight, eps, across, cos, sin, not halves, start, rows),
        (x, weight, eps, across, cos.roll(1, 0), sin, halves, start, rows),
        (x, weight, eps, across, cos, sin[:, ::2].repeat_interleave(2, 1), halves, start, rows),
        (x, weight, eps, across, cos[1:], sin[1:], halves, start, rows),
        (x, None, eps, across, cos, sin, halves, start, rows),
    ):
        with pytest.raises(AssertionError, match="not close"):
            assert_close(found, compute_plainly(Arguments(*wrong)))


@pytest.mark.parametrize("changes", [{"tokens": 0, "rotated": 0}, {"rotated": 0}], ids=str)
def test_nothing_to_do(changes):
    scene = dataclasses.replace(Scene(norm="across"), **changes)
    assert_matches(make_inputs(scene, device=DEVICE))
