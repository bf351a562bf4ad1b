"""Summaries of key blocks against their formulas, and where the tail is exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from dit_opt.kernels.block_sparse_attention import block_sparse_attention
from dit_opt.kernels.block_sparse_attention.tail import summarize_blocks

from .plans import Case, make_inputs


def summarize_plainly(k, v, bias, block_k):
    """n, n * c and n * m of each block by their definition, in float64, for every query head."""
    heads = bias.shape[1]
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    weights = bias.double().exp().unsqueeze(-1)
    n, c, m = [], [], []
    for first in range(0, k.shape[2], block_k):
        w = weights[:, :, first : first + block_k]
        n.append(w.sum((2, 3)))
        c.append((w * k[:, :, first : first + block_k]).sum(2))
        m.append((w * v[:, :, first : first + block_k]).sum(2))
    return torch.stack(n, 2), torch.stack(c, 2), torch.stack(m, 2)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 200),
    block_k=st.sampled_from([16, 64]),
    bias_heads=st.sampled_from([0, 1, 4]),
    seed=st.integers(0, 99),
)
def test_summaries_are_weighted_means(tokens, block_k, bias_heads, seed):
    case = Case(batch=2, heads=4, key_heads=2, queries=1, keys=tokens, dim=8, block_k=block_k)
    k, v = make_inputs(case, seed=seed)[1:3]
    bias = torch.randn(2, max(bias_heads, 1), tokens, generator=torch.Generator().manual_seed(seed))
    bias[torch.rand(bias.shape, generator=torch.Generator().manual_seed(seed)) < 0.4] = -torch.inf
    bias = bias if bias_heads else None
    tail = summarize_blocks(k, v, bias, block_k)
    summary_heads = 4 if bias_heads == 4 else 2
    blocks = -(-tokens // block_k)
    assert tail.centroids.shape == tail.values.shape == (2, summary_heads, blocks, 8)
    assert tail.log_lengths.shape == ((2, bias_heads, blocks) if bias_heads else (1, 1, blocks))

    full = torch.zeros(2, 2, tokens) if bias is None else bias.expand(-1, summary_heads, -1)
    n, c, m = summarize_plainly(k, v, full, block_k)
    torch.testing.assert_close(
        tail.log_lengths.double().exp().expand_as(n), n, atol=1e-6, rtol=1e-5
    )
    lengths = tail.log_lengths.double().exp().unsqueeze(-1)
    torch.testing.assert_close(tail.centroids * lengths, c, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tail.values * lengths, m, atol=1e-5, rtol=1e-5)


def test_a_block_without_keys_has_no_length_and_finite_means():
    k = v = torch.randn(1, 1, 32, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(1, 1, 32)
    bias[..., :16] = -torch.inf
    tail = summarize_blocks(k, v, bias, 16)
    assert tail.log_lengths.flatten().tolist() == [-math.inf, pytest.approx(math.log(16))]
    assert torch.equal(tail.centroids[:, :, 0], torch.zeros(1, 1, 4))


def test_large_biases_do_not_overflow():
    k = v = torch.randn(1, 1, 20, 4, generator=torch.Generator().manual_seed(0))
    plain = summarize_blocks(k, v, None, 16)
    shifted = summarize_blocks(k, v, torch.full((1, 1, 20), 300.0), 16)
    torch.testing.assert_close(shifted.log_lengths, plain.log_lengths + 300)
    torch.testing.assert_close(shifted.centroids, plain.centroids)


@pytest.mark.parametrize("tokens", [256, 250])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_not_rounded(tokens, dtype):
    x = torch.rand(1, 2, tokens, 8, generator=torch.Generator().manual_seed(0)) + 500
    x = x.to(dtype)
    tail = summarize_blocks(x, x, None, 128)
    expected = summarize_blocks(x.float(), x.float(), None, 128)
    assert tail.values.dtype == dtype and tail.log_lengths.dtype == torch.float32
    assert torch.equal(tail.values, expected.values.to(dtype))


def test_a_symbolic_trace_serves_every_length_of_two_blocks():
    def summarize(k, v, bias):
        return (*summarize_blocks(k, v, None, 64), *summarize_blocks(k, v, bias, 64))

    def inputs(tokens):
        _, k, v, _, _, bias, *_ = make_inputs(Case(batch=2, keys=tokens, bias=True))
        return k, v, bias

    graph = make_fx(summarize, tracing_mode="symbolic")(*inputs(192))
    for tokens in (65, 128, 192, 250, 1000):
        for guard in graph.shape_env.guards:
            (symbol,) = guard.expr.free_symbols
            assert guard.expr.subs({symbol: tokens}) == True  # noqa: E712
        traced, expected = graph(*inputs(tokens)), summarize(*inputs(tokens))
        torch.testing.assert_close(list(traced), list(expected), atol=1e-6, rtol=1e-6)


def attend_densely(arguments):
    """Output and lse of dense attention, in float64."""
    q, k, v, bias, scale = (*arguments[:3], *arguments[5:7])
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = None if bias is None else bias.double().unsqueeze(-2)
    out = scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale)
    scores = q.double() @ k.mT * scale
    return out, (scores if bias is None else scores + mask).logsumexp(-1)


EXACT = {
    "plain": Case(heads=4, batch=2, queries=150, keys=201),
    "even": Case(queries=150, keys=192),
    "bias": Case(batch=2, queries=150, keys=201, bias=True),
    "bias of query heads": Case(heads=4, queries=70, keys=150, bias=True, bias_heads=4),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT.keys())
def test_exact_where_keys_are_equal_within_blocks(case):
    arguments = list(make_inputs(case))
    each = arguments[1][:, :, :: case.block_k]
    arguments[1] = each.repeat_interleave(case.block_k, 2)[:, :, : case.keys]
    out, lse = block_sparse_attention(*arguments, tail="centroid")
    expected, expected_lse = attend_densely(arguments)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)
    dropped, _ = block_sparse_attention(*arguments)
    assert float((dropped - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT.keys())
def test_exact_where_every_block_is_kept(case):
    arguments = make_inputs(Case(**{**vars(case), "density": 1.0}))
    out, lse = block_sparse_attention(*arguments, tail="centroid")
    expected, expected_lse = attend_densely(arguments)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


def test_smooth_keys_err_less_than_without_a_tail():
    generator = torch.Generator().manual_seed(0)
    case = Case(queries=256, keys=512, density=0.25)
    arguments = list(make_inputs(case))
    for i in (1, 2):
        steps = torch.randn(1, 2, 512 // 32, case.dim, generator=generator)
        noise = torch.randn(1, 2, 512, case.dim, generator=generator)
        arguments[i] = steps.repeat_interleave(32, 2) + 0.5 * noise
    expected, _ = attend_densely(arguments)
    errors = [
        float((block_sparse_attention(*arguments, tail=tail)[0] - expected).norm())
        for tail in ("centroid", "drop")
    ]
    assert errors[0] < 0.7 * errors[1]
