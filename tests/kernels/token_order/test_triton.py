"""Runs the cases of the kernel that moves tokens, interpreted anywhere and compiled on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.interpreter import INTERPRET, run_cases

pytest.importorskip("triton")


@INTERPRET
def test_the_kernel_matches_pytorch(interpret):
    run_cases(Path(__file__).with_name("interpreted_token_order.py"), interpret)
