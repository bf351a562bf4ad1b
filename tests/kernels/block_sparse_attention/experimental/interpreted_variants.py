"""Cases for the variants that Triton can interpret; `test_variants.py` runs them apart.

bfloat16 is left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.block_sparse_attention import reference
from dit_opt.kernels.block_sparse_attention.contract import new_outputs
from dit_opt.kernels.block_sparse_attention.experimental import int8, specialised, variants
from dit_opt.kernels.block_sparse_attention.impl.triton import attention as kernel
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling

from ..plans import Case, assert_matches_reference, make_call, make_inputs

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


def specialise(arguments, tile_k=64):
    """By the launcher of all kernels, as a measured tiling would be."""
    tiling = Tiling(128, tile_k, 4, 2, "specialised")
    return tuple(x.cpu() for x in kernel.attend(make_call(arguments, DEVICE), tiling))


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
        specialise(arguments)


def test_specialised_without_keys():
    arguments = list(make_inputs(CASES["even"], torch.float16))
    arguments[1], arguments[2] = arguments[1][:, :, :0], arguments[2][:, :, :0]
    out, lse = specialised.attend(make_call(arguments, DEVICE))
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())


# A step of 8 bits is the 127th part of the largest of a block, four times the deviation of normal
# ones, so that each product of queries and keys is off by 1.3 % of its deviation.
INT8_ERROR = 1.5e-2


def measure_int8(arguments):
    """How far an output in 8 bits is off relative to the specification, and the worst of lse."""
    out, lse = (x.cpu() for x in int8.attend(make_call(arguments, DEVICE)))
    inputs = [x.double() if i < 3 else x for i, x in enumerate(arguments)]
    expected, expected_lse = reference.attend(*inputs, dtype=torch.float64)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    is_row = expected_lse > -torch.inf
    assert bool((out[~is_row] == 0).all())
    if not is_row.any():
        return 0.0, 0.0
    off = float((out.double() - expected).norm() / expected.norm())
    return off, float((lse - expected_lse)[is_row].abs().max())


@pytest.mark.parametrize("name", ["ragged, wide", "one plan each", "empty"])
def test_int8_is_as_near_as_eight_bits_allow(name):
    off, lse_off = measure_int8(make_inputs(CASES[name], torch.float16))
    assert off <= INT8_ERROR and lse_off <= 0.03


def test_int8_keys_may_have_a_large_part_in_common(monkeypatch):
    arguments = list(make_inputs(CASES["grouped heads, batch"], torch.float16))
    offset = 8 * torch.randn(arguments[1].shape[-1], generator=torch.Generator().manual_seed(1))
    arguments[1] = arguments[1] + offset.half()
    off, lse_off = measure_int8(arguments)
    assert off <= INT8_ERROR and lse_off <= 0.03
    monkeypatch.setattr(int8, "average_keys", lambda k: torch.zeros_like(k[:, :, 0]).float())
    off, lse_off = measure_int8(arguments)
    assert off > 3 * INT8_ERROR and lse_off > 0.1


@pytest.mark.parametrize("tokens", [64, 100])
def test_quantized_blocks_come_back(tokens):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 4, 64, generator=generator).half().transpose(1, 2)
    x[0, 0] = 0
    mean = torch.randn(2, 2, 64, generator=generator)
    queries, shifts = int8.quantize_queries(x.to(DEVICE), mean.to(DEVICE), 64)
    keys = int8.quantize_keys(x.to(DEVICE), mean.to(DEVICE), 64)
    for_heads = mean.repeat_interleave(2, 1).unsqueeze(2)
    expected = (x.float() * for_heads).sum(-1)
    torch.testing.assert_close(shifts.cpu(), expected, atol=1e-4, rtol=1e-4)
    for found, exact in ((queries, x.float()), (keys, x.float() - for_heads)):
        blocks = -(-tokens // 64)
        assert found.values.dtype == torch.int8 and found.scales.shape == (2, 4, blocks)
        scales = found.scales.cpu().repeat_interleave(64, -1)[..., :tokens, None]
        off = (found.values.cpu() * scales - exact).abs() / scales
        assert float(off.max()) <= 0.501
        largest = found.values.cpu().int().abs().amax((2, 3))
        assert bool((largest[exact.abs().amax((2, 3)) > 0] == 127).all())
