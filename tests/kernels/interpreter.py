"""Runs a file of Triton cases in a process of its own, where the interpreter can be chosen.

Triton reads TRITON_INTERPRET when a kernel is defined, so one process cannot do both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# "1" interprets on any machine, "0" compiles for a GPU.
INTERPRET = pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=NEEDS_GPU)])


def run_cases(cases: Path, interpret: str) -> None:
    """Fail unless every case passes, and there are some."""
    done = subprocess.run(
        # one process: others would spend more on imports than the cases take
        [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
