"""The zoo: records that are told apart, built alike each time, and loaded when they are built."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from zoo import MODELS
from zoo.images import IMAGES
from zoo.inputs import draw, runs
from zoo.record import B, H, T, W, resolve
from zoo.video import VIDEO


def test_each_model_has_a_name_of_its_own_and_says_what_is_special():
    assert len(MODELS) == len(VIDEO) + len(IMAGES) > 70
    assert all(model.note.endswith(".") for model in MODELS.values())


def test_diffusers_is_imported_by_what_is_built():
    program = "import sys, zoo; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_same_model_is_built_each_time_and_chance_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    (first, given), (second, again) = (MODELS["dit"].build(grid=(1, 4, 4)) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    with torch.no_grad():
        assert torch.equal(first(**given)[0], second(**again)[0])
    assert not first.training and all(p.abs().sum() > 0 for p in first.parameters())


def test_sizes_are_numbers_inside_of_all_containers():
    sizes = {B: 2, T: 3, H: 4, W: 6}
    spec = {"a": [2 * H, (T * W / 2, "x")], "b": draw(B, T), "c": runs((True, T), (False, B))}
    found = resolve(spec, sizes)
    assert found["a"] == [8, (9, "x")]
    assert found["b"].shape == (2, 3) and torch.equal(found["b"], resolve(draw(B, T), sizes))
    assert found["c"].tolist() == [[True, True, True, False, False]]


def test_a_size_that_is_not_whole_is_an_error():
    with pytest.raises(ValueError, match="T/2 is 3/2, not whole"):
        resolve(T / 2, {T: 3})
