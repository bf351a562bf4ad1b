"""The CPU path against the float64 specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_opt.kernels import scores
from dit_opt.kernels.block_sparse_attention.impl import cpu
from dit_opt.kernels.block_sparse_attention.impl.cpp import attention as cpp_attention
from dit_opt.kernels.block_sparse_attention.impl.torch import attention as torch_attention
from dit_opt.kernels.block_sparse_attention.impl.torch import dense, strips
from dit_opt.kernels.cpp.build import load_library

from .plans import Case, assert_matches_reference, make_call, make_inputs, make_plan

# Largest error of out and of lse for standard normal inputs. bfloat16 rounds the scores, the
# weights and the result (values up to 4) to 8 bits each; its lse is that of the rounded scores.
ERRORS = {
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (3e-2, 2e-2),
    torch.float16: (2e-3, 2e-6),
}

CASES = {
    "even": Case(),
    "ragged": Case(queries=150, keys=201),
    "ragged, odd, one key block": Case(queries=1, keys=33),
    "cross": Case(queries=70, keys=300, block_k=128),
    "grouped heads": Case(heads=6, key_heads=2, queries=150, keys=140),
    "batch": Case(batch=3, plan_batch=3, queries=130, keys=140),
    "one plan for a batch": Case(batch=2, queries=130, keys=140),
    "strided": Case(batch=2, strided=True, queries=150, keys=150),
    "bias": Case(batch=2, bias=True, queries=150, keys=201),
    "bias, grouped heads": Case(batch=2, heads=4, bias=True, queries=150, keys=201),
    "dense": Case(density=1.0, queries=300, keys=170),
    "empty": Case(density=0.0),
    "odd dimension": Case(dim=40, queries=100, keys=100),
}


NATIVE = {
    "wide": Case(dim=128, queries=150, keys=300, block_k=128),
    "widest, a block of queries at once": Case(dim=256, queries=200, keys=100, block_q=128),
    "more rows than fit, ragged": Case(dim=48, queries=333, keys=150, block_q=128, block_k=32),
}


@pytest.fixture
def attended(monkeypatch):
    """The dtypes of the calls that the C++ kernel took."""
    calls, attend = [], cpp_attention.attend
    monkeypatch.setattr(
        cpp_attention, "attend", lambda call, *a: calls.append(call.q.dtype) or attend(call, *a)
    )
    return calls


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case, dtype, torch_path):
    arguments = make_inputs(case, dtype)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, *ERRORS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", (CASES | NATIVE).values(), ids=(CASES | NATIVE).keys())
def test_the_native_kernel_matches_the_reference(case, dtype, attended):
    if load_library() is None:
        pytest.skip("there is no C++ compiler")
    arguments = make_inputs(case, dtype)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, *ERRORS[dtype])
    assert attended == ([torch.float32] if case.dim % 16 == 0 else [])
    without, empty = cpu.attend(make_call(arguments, with_lse=False))
    assert empty.numel() == 0 and torch.equal(without, cpu.attend(make_call(arguments))[0])


@settings(max_examples=25)
@given(
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    queries=st.integers(1, 200),
    keys=st.integers(1, 200),
    dim=st.sampled_from([8, 33, 48, 64]),
    density=st.floats(0.0, 1.0),
    bias=st.booleans(),
    strided=st.booleans(),
    block_k=st.sampled_from([16, 64]),
    seed=st.integers(0, 99),
    by_torch=st.booleans(),
)
def test_any_shape_matches_the_reference(group, key_heads, seed, by_torch, **sizes):
    case = Case(heads=group * key_heads, key_heads=key_heads, block_q=32, **sizes)
    arguments = make_inputs(case, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        if by_torch:
            patch.setattr(cpp_attention, "fits", lambda call: "switched off")
        assert_matches_reference(cpu.attend(make_call(arguments)), arguments, 3e-6, 3e-6)


def test_small_gathers_give_the_same_result(monkeypatch, torch_path):
    arguments = make_inputs(Case(heads=4, key_heads=4, queries=500, keys=450))
    whole = cpu.attend(make_call(arguments))
    monkeypatch.setattr(torch_attention, "GATHER_BYTES", 1)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, 2e-6, 2e-6)
    torch.testing.assert_close(cpu.attend(make_call(arguments)), whole, atol=1e-6, rtol=1e-6)


def test_shared_ranges_are_sliced_and_not_gathered(monkeypatch, torch_path):
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[:, :, :2, :2] = True
    mask[:, :, 2:, 1:] = True
    case = Case(queries=250, keys=250)
    arguments = list(make_inputs(case))
    arguments[3:5] = make_plan(mask)
    monkeypatch.setattr(torch_attention, "_attend_gathered", lambda *_: pytest.fail("gathered"))
    assert_matches_reference(cpu.attend(make_call(arguments)), tuple(arguments), 2e-6, 2e-6)


def test_score_tiles_give_the_same_result(monkeypatch):
    arguments = make_inputs(Case(density=1.0, queries=250, keys=250), torch.bfloat16)
    monkeypatch.setattr(dense, "SCORE_BYTES", 250 * 64)
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, *ERRORS[torch.bfloat16])


def test_large_bfloat16_scores_are_not_rounded():
    case = Case(queries=150, keys=201, density=0.9)
    q, k, *rest = make_inputs(case, torch.bfloat16)
    arguments = (q * 16, k * 4, *rest)
    assert scores.bound_scores(*arguments[:2], arguments[6]) > scores.SCORE_BOUND
    # Rounded scores would be off by up to 2^-9 of 200, and the lse with them.
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, 3e-2, 1e-3)


@pytest.mark.parametrize("flash_queries", [1, 10**9])
def test_both_forms_of_float32_match_the_reference(monkeypatch, torch_path, flash_queries):
    monkeypatch.setattr(dense, "FLASH_QUERIES", flash_queries)
    multiply, used = dense._multiply, []
    monkeypatch.setattr(dense, "_multiply", lambda *a: used.append(1) or multiply(*a))
    for case in (CASES["ragged"], CASES["bias"], CASES["grouped heads"]):
        arguments = make_inputs(case)
        assert_matches_reference(cpu.attend(make_call(arguments)), arguments, 2e-6, 2e-6)
    assert bool(used) == (flash_queries > 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [1, 30])
@pytest.mark.parametrize("steps", [1, 8])
def test_lists_that_are_filled_up_match_the_reference(monkeypatch, torch_path, bias, factor, steps):
    monkeypatch.setattr(strips, "STEPS", steps)
    mask, filled = dense._mask_padding, []
    monkeypatch.setattr(
        dense, "_mask_padding", lambda *a: filled.append(a[2] is not None) or mask(*a)
    )
    q, k, *rest = make_inputs(
        Case(batch=2, bias=bias, queries=120, keys=700, block_q=16, block_k=16, density=0.6)
    )
    arguments = (q * factor, k, *rest)
    bounded = scores.bound_scores(*arguments[:2], arguments[6]) <= scores.SCORE_BOUND
    assert bounded == (factor == 1)
    # Scores of 100 have a float32 spacing of 1e-5.
    assert_matches_reference(
        cpu.attend(make_call(arguments)), arguments, 2e-6 * factor, 2e-6 * factor
    )
    assert any(filled)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("queries", [100, 250])
def test_large_scores_do_not_overflow(request, queries, by_torch):
    if by_torch:
        request.getfixturevalue("torch_path")
    q, k, *rest = make_inputs(Case(queries=queries, keys=100, density=1.0))
    arguments = (q * 100, k * 100, *rest)
    # Scores of 1e5 have a float32 spacing of 0.01.
    assert_matches_reference(cpu.attend(make_call(arguments)), arguments, 5e-2, 5e-2)


@pytest.mark.parametrize("by_torch", [False, True])
def test_unkept_keys_are_never_read(request, by_torch):
    if by_torch:
        request.getfixturevalue("torch_path")
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[..., 1] = False
    arguments = list(make_inputs(Case()))
    arguments[3:5] = make_plan(mask)
    expected = cpu.attend(make_call(arguments))
    arguments[1][:, :, 64:128] = torch.nan
    arguments[2][:, :, 64:128] = torch.nan
    torch.testing.assert_close(cpu.attend(make_call(arguments)), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("case", "dtype", "words"),
    [
        (Case(tail=True), torch.float32, "no centroid tail"),
        (Case(), torch.bfloat16, "float32, not torch.bfloat16"),
        (Case(dim=40), torch.float32, "not 40"),
        (Case(block_k=256), torch.float32, "not 256"),
        (Case(), torch.float32, ""),
    ],
)
def test_what_the_native_kernel_does_not_take_has_a_reason(case, dtype, words):
    if load_library() is None:
        pytest.skip("there is no C++ compiler")
    reason = cpp_attention.fits(make_call(make_inputs(case, dtype)))
    assert words in reason and bool(reason) == bool(words)
