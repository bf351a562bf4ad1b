"""Attention that reads tokens in an order of each head agrees with moving them."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.ordered_attention import attend_in_order

from .block_sparse_attention.plans import Case, make_inputs

operator = torch.ops.ditopt.ordered_attention_v1.default

CASES = {
    "whole blocks": Case(batch=2, queries=128, keys=128),
    "ragged": Case(batch=2, queries=150, keys=150),
    "strided": Case(batch=2, queries=150, keys=150, strided=True),
    "grouped heads": Case(heads=4, queries=77, keys=77),
    "plans of items": Case(batch=2, plan_batch=2, queries=150, keys=150),
    "bias": Case(batch=2, heads=4, queries=150, keys=150, bias=True),
    "empty rows": Case(queries=150, keys=150, density=0.1),
}


def make_arguments(case, dtype=torch.float32):
    q, k, v, *lists, bias, scale, block_q, block_k = make_inputs(case, dtype)
    rng = torch.Generator().manual_seed(1)
    rows = torch.rand(q.shape[:3], generator=rng).argsort(-1)
    return q, k, v, rows, rows.argsort(-1), *lists, bias, scale, block_q, block_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_agrees_with_moving_the_tokens(case, dtype):
    arguments = make_arguments(case, dtype)
    out, expected = operator(*arguments), attend_in_order(*arguments)
    assert out.stride() == expected.stride() and out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("peak", [1.0, 10.0])
def test_order_changes_nothing_where_all_is_kept(peak):
    case = Case(batch=2, heads=4, queries=150, keys=150, density=1.0)
    q, k, v, *rest = make_arguments(case)
    out = operator(q * peak, k, v, *rest)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q * peak, k, v, scale=rest[5])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_opcheck(case):
    results = torch.library.opcheck(operator, make_arguments(case))
    assert set(results.values()) == {"SUCCESS"}


def test_results_survive_the_next_call():
    first, second = (make_arguments(case) for case in (CASES["ragged"], CASES["bias"]))
    out = operator(*first)
    expected = out.clone()
    operator(*second)
    assert torch.equal(out, expected)


def test_orders_have_to_fit():
    q, k, v, rows, inverse, *rest = make_arguments(CASES["ragged"])
    with pytest.raises(ValueError, match=r"must be int64 \[B, H, N\], not torch.int32"):
        operator(q, k, v, rows.int(), inverse, *rest)
    with pytest.raises(ValueError, match="rows and inverse must be"):
        operator(q, k, v, rows, inverse[:, :, 1:], *rest)
    with pytest.raises(ValueError, match="no multiple of"):
        operator(
            q[:, :1].expand(-1, 3, -1, -1),
            k[:, :1].expand(-1, 2, -1, -1),
            v[:, :1].expand(-1, 2, -1, -1),
            rows,
            inverse,
            *rest,
        )


def test_no_tokens_give_no_output():
    q, k, v, rows, inverse, counts, indices, *rest = make_arguments(CASES["ragged"])
    empty = (x[:, :, :0] for x in (q, k, v, rows, inverse, counts, indices))
    assert operator(*empty, *rest).shape == q[:, :, :0].shape


def test_a_gpu_runs_the_specification():
    name = "ditopt::ordered_attention_v1"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
