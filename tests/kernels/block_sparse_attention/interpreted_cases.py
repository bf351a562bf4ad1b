"""Cases for the Triton kernel; `test_triton.py` runs them in a process of their own.

TRITON_INTERPRET must be set before the kernel's module is imported, and would change every other
test of the same process. bfloat16 is left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.block_sparse_attention import triton as kernel
from dit_opt.kernels.block_sparse_attention.contract import new_outputs

from .plans import Case, assert_matches_reference, make_inputs

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ERRORS = {torch.float32: (3e-6, 3e-6), torch.float16: (3e-3, 3e-6)}

CASES = {
    "even": Case(dim=64, queries=256, keys=256, block_q=128),
    "ragged": Case(dim=64, queries=150, keys=201),
    "ragged below one tile": Case(dim=48, queries=70, keys=130, block_q=128, block_k=128),
    "grouped heads, batch": Case(batch=2, heads=4, key_heads=2, dim=32, queries=100, keys=190),
    "one plan each": Case(batch=2, plan_batch=2, dim=64, queries=150, keys=150),
    "bias": Case(batch=2, bias=True, dim=64, queries=150, keys=201),
    "bias, even": Case(bias=True, dim=80, queries=128, keys=256, block_k=128),
    "empty": Case(density=0.0, dim=64),
    "strided": Case(batch=2, strided=True, dim=80, queries=150, keys=150),
    "unaligned": Case(dim=33, queries=100, keys=150),
    "wide": Case(dim=128, queries=150, keys=150, block_k=128),
    "widest": Case(heads=1, key_heads=1, dim=256, queries=70, keys=100),
    "small blocks": Case(dim=32, queries=100, keys=100, block_q=32, block_k=16),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that whatever is not written shows."""

    def new_poisoned(q):
        out, lse = new_outputs(q)
        return out.fill_(torch.nan), lse.fill_(torch.nan)

    monkeypatch.setattr(kernel, "new_outputs", new_poisoned)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case, dtype):
    arguments = make_inputs(case, dtype)
    on_device = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    out, lse = (x.cpu() for x in kernel.launch(*on_device))
    assert_matches_reference((out, lse), arguments, *ERRORS[dtype])


def test_keys_that_start_off_alignment():
    arguments = list(make_inputs(Case(dim=64, queries=100, keys=150), torch.float16))
    storage = torch.empty(arguments[1].numel() + 1, dtype=torch.float16)
    arguments[1] = storage[1:].view_as(arguments[1]).copy_(arguments[1])
    on_device = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    out, lse = (x.cpu() for x in kernel.launch(*on_device))
    assert_matches_reference((out, lse), tuple(arguments), *ERRORS[torch.float16])


def test_no_keys_at_all():
    arguments = list(make_inputs(Case(dim=32)))
    arguments[1], arguments[2] = arguments[1][:, :, :0], arguments[2][:, :, :0]
    out, lse = kernel.launch(*arguments)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())
