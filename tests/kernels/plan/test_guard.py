from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_opt.kernels.plan.guard import (
    MAX_ROWS,
    check_plan,
    compare_heads,
    guard_plan,
    sample_rows,
)
from dit_opt.kernels.plan.plan import list_kept

BLOCK_Q, BLOCK_K = 16, 8


def make(queries=90, heads=4, key_heads=2, batch=2, dim=16, share=0.5):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, dim) * 2
    k, v = (torch.randn(batch, key_heads, queries, dim) for _ in range(2))
    shape = (batch, heads, -(-queries // BLOCK_Q), -(-queries // BLOCK_K))
    mask = torch.rand(shape) < share
    mask[..., 0] = True
    return q, k, v, mask


def reference(q, k, v, mask, bias, scale):
    """Kept mass and error of the sampled rows, from the whole score matrix."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * scale + (0 if bias is None else bias[:, :, None])
    rows = sample_rows(q.shape[2], BLOCK_Q, q.device)
    mass = scores.softmax(-1)[:, :, rows]
    shown = mask[:, :, rows // BLOCK_Q].repeat_interleave(BLOCK_K, -1)[..., : k.shape[2]]
    kept = (mass * shown).sum(-1)
    sparse = (mass * shown / kept.unsqueeze(-1)) @ v
    dense = mass @ v
    return kept.mean(-1), (sparse - dense).flatten(2).norm(dim=-1) / dense.flatten(2).norm(dim=-1)


@settings(max_examples=15)
@given(st.integers(17, 150), st.booleans(), st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_mass_and_error_are_those_of_the_lists(queries, with_bias, heads):
    q, k, v, mask = make(queries, *heads)
    bias = torch.randn(2, 1, queries) if with_bias else None
    counts, indices = list_kept(mask)
    kept, error = check_plan(q, k, v, counts, indices, bias, 0.3, BLOCK_Q, BLOCK_K)
    wanted = reference(q, k, v, mask, bias, 0.3)
    torch.testing.assert_close(kept, wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(error, wanted[1], rtol=1e-4, atol=1e-5)


def test_heads_in_parts_are_the_same(monkeypatch):
    from dit_opt.kernels.plan import guard

    q, k, v, mask = make()
    whole = check_plan(q, k, v, *list_kept(mask), None, 0.3, BLOCK_Q, BLOCK_K)
    monkeypatch.setattr(guard, "_SCORES", 1)
    parts = check_plan(q, k, v, *list_kept(mask), None, 0.3, BLOCK_Q, BLOCK_K)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [1, 16, 17, 100, 16 * 200 + 3])
def test_rows_come_from_as_many_blocks_as_there_are(queries):
    rows = sample_rows(queries, BLOCK_Q, torch.device("cpu"))
    blocks = -(-queries // BLOCK_Q)
    assert len(rows) == min(blocks, MAX_ROWS) and rows.max() < queries
    assert len((rows // BLOCK_Q).unique()) == len(rows)
    if blocks >= MAX_ROWS:
        # all over the blocks, not at their start
        assert len((rows % BLOCK_Q).unique()) > BLOCK_Q // 2


def test_a_head_under_its_expectation_gets_every_block():
    q, k, v, mask = make()
    counts, indices = list_kept(mask)
    kept, _ = check_plan(q, k, v, counts, indices, None, 0.3, BLOCK_Q, BLOCK_K)
    expected = kept.clone()
    expected[1, 2] += 0.2
    out = guard_plan(q, k, v, counts, indices, None, 0.3, expected, 0.1, BLOCK_Q, BLOCK_K)
    assert out[4].nonzero().tolist() == [[1, 2]]
    assert (out[0][1, 2] == mask.shape[-1]).all()
    assert torch.equal(out[1][1, 2, 0], torch.arange(mask.shape[-1], dtype=torch.int32))
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(out[0][others], counts[others])
    assert torch.equal(out[1][others], indices[others])
    nobody = guard_plan(q, k, v, counts, indices, None, 0.3, None, 0.1, BLOCK_Q, BLOCK_K)
    assert nobody[4].sum() == 0 and torch.equal(nobody[0], counts)


def test_rows_without_keys_keep_everything():
    q, k, v, mask = make()
    bias = torch.full((2, 1, 90), -torch.inf)
    bias[1] = 0
    kept, error = check_plan(q, k, v, *list_kept(mask), bias, 0.3, BLOCK_Q, BLOCK_K)
    assert (kept[0] == 1).all() and (error[0] == 0).all() and (kept[1] < 1).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("place", [0, 33, 89])
def test_what_is_not_a_number_is_caught(place, with_bias):
    q, k, v, mask = make()
    k[1, 0, place] = torch.nan
    bias = torch.zeros(2, 1, 90) if with_bias else None
    plan = list_kept(mask)
    for expected in (None, torch.zeros(2, 4)):
        out = guard_plan(q, k, v, *plan, bias, 0.3, expected, 0.1, BLOCK_Q, BLOCK_K)
        # two query heads share a key head
        assert out[4].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
        assert out[2].isnan().tolist() == out[3].isnan().tolist() == out[4].bool().tolist()
        assert (out[0][1, :2] == mask.shape[-1]).all()
    never = torch.full((2, 4), torch.nan)
    k[1, 0, place] = 0
    out = guard_plan(q, k, v, *plan, bias, 0.3, never, 0.1, BLOCK_Q, BLOCK_K)
    assert (out[4] == 1).all() and out[2].isfinite().all()


def test_differences_by_head():
    dense = torch.randn(2, 3, 8, 4)
    out = dense.clone()
    out[1, 2] *= 1.5
    wanted = torch.zeros(2, 3)
    wanted[1, 2] = 0.5
    torch.testing.assert_close(compare_heads(out, dense), wanted)
    flat = compare_heads(out.flatten(0, 1), dense.flatten(0, 1))
    torch.testing.assert_close(flat, wanted.flatten()[:, None])
    dense[0, 0, 0] = torch.nan
    assert compare_heads(out, dense)[0, 0] == 0


def test_opcheck():
    q, k, v, mask = make()
    counts, indices = list_kept(mask)
    rest = (None, 0.3, torch.rand(2, 4), 0.05, BLOCK_Q, BLOCK_K)
    torch.library.opcheck(torch.ops.ditopt.guard_plan_v1.default, (q, k, v, counts, indices, *rest))
