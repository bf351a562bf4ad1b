"""Cases for the variants that Triton can interpret; `test_variants.py` runs them apart.

bfloat16 is left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.block_sparse_attention import triton_specialised, variants
from dit_opt.kernels.block_sparse_attention.contract import new_outputs
from dit_opt.kernels.block_sparse_attention.tilings import Tiling

from .plans import Case, assert_matches_reference, make_inputs

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ERRORS = {torch.float32: (3e-6, 3e-6), torch.float16: (3e-3, 3e-6)}
if DEVICE == "cuda":
    # which the compiled kernels refuse
    del ERRORS[torch.float32]

CASES = {
    "even": Case(dim=64, queries=256, keys=256, block_q=128),
    "ragged": Case(dim=64, queries=150, keys=201, block_q=128),
    "ragged, wide": Case(dim=128, queries=150, keys=201, block_q=128, block_k=128),
    "grouped heads, batch": Case(
        batch=2, heads=4, dim=64, queries=100, keys=190, block_q=128, strided=True
    ),
    "one plan each": Case(batch=2, plan_batch=2, dim=64, queries=150, keys=150, block_q=128),
    "empty": Case(density=0.0, dim=64, block_q=128),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that whatever is not written shows; float32 is let through."""

    def new_poisoned(q):
        out, lse = new_outputs(q)
        return out.fill_(torch.nan), lse.fill_(torch.nan)

    monkeypatch.setattr(variants, "new_outputs", new_poisoned)
    if DEVICE == "cpu":
        monkeypatch.setattr(variants, "DTYPES", (*variants.DTYPES, torch.float32))


def move(arguments):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]


def specialise(arguments, tile_k=64):
    tiling = Tiling(128, tile_k, 4, 2, "specialised")
    found = triton_specialised.launch(*move(arguments), tiling=tiling)
    return tuple(x.cpu() for x in found)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_specialised_matches_the_reference(case, dtype):
    arguments = make_inputs(case, dtype)
    assert_matches_reference(specialise(arguments, case.block_k), arguments, *ERRORS[dtype])


def test_specialised_tiles_beyond_the_last_key_weigh_nothing():
    case = Case(dim=64, queries=150, keys=140, block_q=128, block_k=128, density=1.0)
    arguments = make_inputs(case, torch.float16)
    assert_matches_reference(specialise(arguments), arguments, *ERRORS[torch.float16])


def test_specialised_refuses_what_it_does_not_take():
    arguments = list(make_inputs(Case(dim=64, block_q=128, bias=True), torch.float16))
    with pytest.raises(ValueError, match=r"specialised variant .*neither"):
        triton_specialised.launch(*move(arguments))


def test_specialised_without_keys():
    arguments = list(make_inputs(CASES["even"], torch.float16))
    arguments[1], arguments[2] = arguments[1][:, :, :0], arguments[2][:, :, :0]
    out, lse = specialise(arguments)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())
