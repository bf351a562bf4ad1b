"""The specification itself, against the plainest loop and against dense attention."""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_opt.kernels.block_sparse_attention import reference

from .plans import Case, make_inputs, make_plan


def test_expand_lists_ignores_entries_past_the_count():
    mask = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    assert torch.equal(reference.expand_lists(*make_plan(mask), 7), mask)


def test_each_row_is_softmax_over_the_tokens_of_its_blocks():
    case = Case(heads=2, key_heads=1, queries=100, keys=90, dim=16, bias=True, density=0.6)
    arguments = make_inputs(case)
    q, k, v, counts, indices, bias, scale, block_q, block_k = arguments
    out, lse = reference.attend(*arguments, dtype=torch.float64)
    for head in range(2):
        for row in range(100):
            block = row // block_q
            kept = indices[0, head, block, : counts[0, head, block]].tolist()
            tokens = [t for j in kept for t in range(j * block_k, min(90, (j + 1) * block_k))]
            scores = k[0, 0, tokens].double() @ q[0, head, row].double() * scale
            weights = (scores + bias[0, 0, tokens]).exp()
            total = weights.sum()
            expected = weights @ v[0, 0, tokens].double() / total if total > 0 else 0 * q[0, 0, 0]
            torch.testing.assert_close(
                out[0, head, row].double(), expected.double(), atol=1e-6, rtol=0
            )
            torch.testing.assert_close(lse[0, head, row].double(), total.log(), atol=1e-6, rtol=0)


def test_dropped_blocks_add_their_length_at_their_centroid():
    case = Case(
        heads=2, key_heads=1, queries=100, keys=90, dim=16, bias=True, density=0.4, tail=True
    )
    arguments = make_inputs(case)
    q, k, v, counts, indices, bias, scale, block_q, block_k, _ = arguments
    out, lse = reference.attend(*arguments, dtype=torch.float64)
    k, v, w = k[0, 0].double(), v[0, 0].double(), bias[0, 0].double().exp().unsqueeze(-1)
    for head, row in itertools.product(range(2), range(0, 100, 9)):
        block = row // block_q
        kept = indices[0, head, block, : counts[0, head, block]].tolist()
        x = q[0, head, row].double() * scale
        total, numerator = torch.zeros(()).double(), torch.zeros(16).double()
        for j in range(-(-90 // block_k)):
            own = slice(j * block_k, min(90, (j + 1) * block_k))
            n = w[own].sum()
            if j in kept:
                weights = w[own] * (k[own] @ x).exp().unsqueeze(-1)
                total, numerator = total + weights.sum(), numerator + (weights * v[own]).sum(0)
            elif n > 0:
                centroid, mean = ((w[own] * y[own]).sum(0) / n for y in (k, v))
                weight = n * (centroid @ x).exp()
                total, numerator = total + weight, numerator + weight * mean
        expected = numerator / total if total > 0 else numerator
        torch.testing.assert_close(out[0, head, row].double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(lse[0, head, row].double(), total.log(), atol=1e-6, rtol=0)


def test_full_lists_are_dense_attention():
    arguments = make_inputs(Case(queries=130, keys=70, density=1.0))
    out, lse = reference.attend(*arguments)
    expected = scaled_dot_product_attention(*arguments[:3])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    scores = arguments[0] @ arguments[1].mT * arguments[6]
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_rows_without_keys_give_zero_and_minus_infinity():
    out, lse = reference.attend(*make_inputs(Case(density=0.0)))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
