"""Runs the cases of the Triton block mass, interpreted anywhere and compiled where a GPU is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.interpreter import INTERPRET, run_cases

pytest.importorskip("triton")


@INTERPRET
def test_the_kernel_matches_the_reference(interpret):
    run_cases(Path(__file__).with_name("interpreted_block_mass.py"), interpret)
