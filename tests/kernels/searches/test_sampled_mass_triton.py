"""Runs the cases of sampled rows, interpreted anywhere and compiled where a GPU is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.interpreter import INTERPRET, run_cases

pytest.importorskip("triton")


@INTERPRET
def test_the_kernels_match_plain_arithmetic(interpret):
    run_cases(Path(__file__).with_name("interpreted_sampled_mass.py"), interpret)
