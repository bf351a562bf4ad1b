"""The attention part: its float64 samples, and a gate that closes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import gpu_attention
from benchmarks.gpu_attention import OURS, check_case, measure_case, measure_ceilings, sample_rows
from benchmarks.gpu_cases import PADDING, Case, make_inputs, make_key_mask, make_plan
from dit_opt.kernels.block_sparse_attention import reference

CPU = torch.device("cpu")
CASE = Case(16, 1000, 2, 0.4)


def test_samples_are_rows_of_the_reference():
    q, k, v = make_inputs(CASE, torch.float64, CPU)
    plan = make_plan(CASE, CPU)
    places, found = sample_rows(q, k, v, *plan, CASE)
    sizes = (None, CASE.dim**-0.5, CASE.block_q, CASE.block_k)
    out, _ = reference.attend(q, k, v, *plan, *sizes, dtype=torch.float64)
    expected = torch.stack([out[0, head, query] for head, query in places])
    torch.testing.assert_close(found, expected)
    assert places[0][1] == CASE.tokens - 1 and len({head for head, _ in places}) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_kernel_passes(dtype):
    row = check_case(CASE, dtype, CPU)
    assert row["passed"] and 0 < row["relative_error"] <= gpu_attention.TOLERANCE[dtype]


@pytest.mark.parametrize("factor", [1.02, torch.nan])
def test_a_wrong_kernel_has_no_speed(monkeypatch, factor):
    right = gpu_attention.block_sparse_attention
    monkeypatch.setattr(
        gpu_attention, "block_sparse_attention", lambda *a, **k: (factor * right(*a, **k)[0], None)
    )
    row = measure_case(CASE, CPU, 0.0, with_flex=False)
    assert "refused" in row and "eta" not in row


def test_padded_keys_are_left_out_of_the_samples_too():
    case = dataclasses.replace(CASE, masked=True)
    row = check_case(case, torch.float32, CPU)
    assert row["passed"]
    q, k, v = make_inputs(case, torch.float32, CPU)
    plan = make_plan(case, CPU)
    _, expected = sample_rows(q, k, v, *plan, case)
    _, unmasked = sample_rows(q, k, v, *plan, CASE)
    assert not torch.allclose(expected, unmasked, atol=1e-3)
    dense = gpu_attention.list_dense(q, k, v, make_key_mask(case, CPU))["sdpa_default"]()
    v[:, :, -PADDING:] = torch.nan
    assert not dense.isnan().any()
    row = measure_case(case, CPU, 0.0)
    assert row["tiling"] is None and row["speedup_vs_flex"] is None and row["eta"] > 0


def test_a_row_has_its_figures():
    row = measure_case(CASE, CPU, 0.0, with_flex=False)
    times = row["milliseconds"]
    ratio = times["sdpa_default"]["median"] / times[OURS]["median"]
    assert row["speedup"] == pytest.approx(ratio)
    assert row["eta"] == pytest.approx(ratio * row["realised_density"])
    # the only dense kernel here is the default
    assert row["eta_vs_default"] == row["eta"]
    assert row["speedup_vs_flex"] is None and row["failed"] == {}


def test_a_kernel_that_fails_is_left_out_with_its_reason():
    def fail():
        # compilers raise what is no RuntimeError
        raise Exception("no such kernel\nat some place")

    rivals, failed = gpu_attention.drop_failing({"good": lambda: 1, "bad": fail})
    assert list(rivals) == ["good"] and failed == {"bad": "Exception: no such kernel"}


def test_ceilings_are_rates():
    assert all(rate > 0 for rate in measure_ceilings(CPU, 0.0).values())
