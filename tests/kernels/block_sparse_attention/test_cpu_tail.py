"""The CPU path's tail against the float64 specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_opt.kernels import scores
from dit_opt.kernels.block_sparse_attention.impl import cpu
from dit_opt.kernels.block_sparse_attention.impl.torch import tail as cpu_tail

from .plans import Case, assert_matches_reference, make_call, make_inputs, make_plan
from .test_cpu import ERRORS

CASES = {
    "even": Case(tail=True),
    "ragged": Case(tail=True, queries=150, keys=201),
    "grouped heads": Case(tail=True, batch=2, heads=6, queries=70, keys=140),
    "one plan each": Case(tail=True, batch=2, plan_batch=2, queries=130, keys=140),
    "strided": Case(tail=True, batch=2, strided=True, queries=150, keys=150),
    "bias": Case(tail=True, batch=2, bias=True, queries=150, keys=201),
    "bias of query heads": Case(tail=True, heads=4, bias=True, bias_heads=4, keys=201),
    "dense": Case(tail=True, density=1.0, queries=100, keys=170),
    "empty": Case(tail=True, density=0.0),
    "odd dimension": Case(tail=True, dim=33, queries=100, keys=100),
    "many blocks": Case(tail=True, dim=16, queries=70, keys=700, block_q=16, block_k=16),
}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case, dtype):
    arguments = make_inputs(case, dtype)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, *ERRORS[dtype])


@settings(max_examples=25)
@given(
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    queries=st.integers(1, 100),
    keys=st.integers(1, 200),
    dim=st.sampled_from([8, 33]),
    density=st.floats(0.0, 1.0),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_the_reference(group, key_heads, seed, **sizes):
    case = Case(
        heads=group * key_heads, key_heads=key_heads, tail=True, block_q=32, block_k=16, **sizes
    )
    arguments = make_inputs(case, seed=seed)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, 3e-6, 3e-6)


@pytest.mark.parametrize("case", [CASES["ragged"], CASES["bias"]], ids=["plain", "bias"])
def test_small_tiles_give_the_same_result(monkeypatch, case):
    arguments = make_inputs(case)
    monkeypatch.setattr(cpu_tail, "TILE", 1)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, 2e-6, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(dtype):
    q, k, v, *rest = make_inputs(Case(queries=100, keys=201), dtype)
    q, k = q * 16, k * 4
    assert scores.bound_scores(q, k, rest[3]) > scores.SCORE_BOUND
    tail = cpu_tail.Tail(*make_inputs(Case(queries=100, keys=201, tail=True), dtype)[9])
    tail = tail._replace(centroids=tail.centroids * 4)
    arguments = (q, k, v, *rest, tail)
    errors = (3e-2, 1e-3) if dtype == torch.bfloat16 else (1e-3, 1e-3)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, *errors)


def test_kept_blocks_alone_are_left_as_they_are(torch_path):
    arguments = make_inputs(Case(tail=True, density=1.0, queries=150, keys=201))
    expected = cpu.attend(make_call(arguments[:9]))
    torch.testing.assert_close(cpu.attend(make_call(arguments)), expected, atol=0, rtol=0)


def test_the_tokens_of_dropped_blocks_are_never_read():
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[..., 1] = False
    arguments = list(make_inputs(Case(tail=True)))
    arguments[3:5] = make_plan(mask)
    expected = cpu.attend(make_call(arguments))
    # The bound on the scores reads every key, so that only the values can be poisoned.
    arguments[2][:, :, 64:128] = torch.nan
    torch.testing.assert_close(cpu.attend(make_call(arguments)), expected, atol=0, rtol=0)


def test_lists_without_entries():
    arguments = list(make_inputs(CASES["empty"]))
    arguments[4] = arguments[4][..., :0]
    assert_matches_reference(cpu.attend(make_call(arguments)), tuple(arguments), 2e-6, 2e-6)
