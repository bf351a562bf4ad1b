"""The prologue part at toy sizes: both forms are the same, and a wrong one has no speed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_prologue
from benchmarks.gpu_prologue import Shape, measure_prologue

CPU = torch.device("cpu")
SHAPES = [Shape("Wan", 50, 3, True, dim=16), Shape("Flux", 50, 3, False, dim=16)]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def test_both_forms_are_right_and_timed(shape):
    row = measure_prologue(shape, CPU, 0.0)
    assert "refused" not in row and set(row["relative_errors"]) == {"ditopt", "compiled"}
    times = row["milliseconds"]
    assert row["speedup"] == pytest.approx(times["compiled"] / times["ditopt"])
    bytes_moved = 2 * 50 * 3 * 16 * 2
    assert row["tb_per_s"]["ditopt"] == pytest.approx(bytes_moved / times["ditopt"] / 1e9)


@pytest.mark.parametrize("name", ["norm_rope", "compute_as_flux"])
@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_a_wrong_form_has_no_speed(monkeypatch, name, factor):
    right = getattr(gpu_prologue, name)
    monkeypatch.setattr(gpu_prologue, name, lambda *arguments: factor * right(*arguments))
    row = measure_prologue(SHAPES[1], CPU, 0.0)
    assert "wrong" in row["refused"] and "speedup" not in row
