"""Cases for the Triton block mass; `test_block_mass_triton.py` runs them in a process of their own.

TRITON_INTERPRET must be set before the kernel's module is imported, and would change every other
test of the same process. bfloat16 is left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.routers.block_mass import measure_plainly
from dit_opt.kernels.routers.block_mass_triton import launch

from .scenes import Scene, make_inputs

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3}

CASES = {
    "ragged": Scene(tokens=75, heads=2, key_heads=2),
    "even, grouped heads": Scene(tokens=64, heads=2, key_heads=1),
    "bias, batch": Scene(tokens=70, batch=2, heads=1, key_heads=1, bias=True),
    "small blocks share a tile": Scene(tokens=75, heads=2, key_heads=2, block_q=8),
    "blocks of one row": Scene(tokens=35, heads=1, key_heads=1, block_q=1),
    "several tiles per block": Scene(
        tokens=150, heads=1, key_heads=1, dim=40, block_q=128, block_k=128
    ),
}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case, dtype):
    q, k, bias, scale = make_inputs(case)
    q, k = q.to(dtype), k.to(dtype)
    if case.bias:
        bias[0] = -torch.inf
    lse = None
    for growth in (1.0, 1.1):
        arguments = (q * growth, k, bias, lse, scale, case.block_q, case.block_k)
        expected = measure_plainly(*arguments)
        on_device = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
        mass, found = (x.cpu() for x in launch(*on_device))
        error = ERRORS[dtype]
        torch.testing.assert_close(mass, expected[0], rtol=error, atol=error)
        torch.testing.assert_close(found, expected[1], rtol=error, atol=error)
        lse = found


def test_blocks_that_tiles_cannot_cover_are_refused():
    q, k, _, scale = make_inputs(Scene(tokens=64))
    for blocks in ((24, 16), (16, 8)):
        with pytest.raises(ValueError, match=f"block_q={blocks[0]} and block_k={blocks[1]}"):
            launch(q, k, None, None, scale, *blocks)
