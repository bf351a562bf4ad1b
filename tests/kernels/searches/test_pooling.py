"""Pooled cells are means of real tokens and block scores are sums over pairs of them."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.searches.subblock import pooling
from dit_opt.kernels.searches.subblock.pooling import pool_tokens, score_blocks, share_mass

from .scenes import SCENES, make_inputs


def score_slowly(q, k, bias, scale, block_q, block_k, cell_q, cell_k):
    """The formula pair by pair, for one head [N, D]; bias [N] or None."""
    weights = torch.ones(len(k)).double() if bias is None else bias.double().exp()
    out = torch.full((-(-len(q) // block_q), -(-len(k) // block_k)), -torch.inf).double()
    for i in range(0, len(q), cell_q):
        for j in range(0, len(k), cell_k):
            rows, columns = q[i : i + cell_q].double(), k[j : j + cell_k].double()
            score = (rows.mean(0) @ columns.mean(0)) * scale
            score = score + (weights[j : j + cell_k].sum() * len(rows)).log()
            place = (i // block_q, j // block_k)
            out[place] = torch.logaddexp(out[place], score)
    return out


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
@pytest.mark.parametrize(
    "cells, limit", [((16, 16), 1 << 22), ((8, 4), 1 << 22), ((32, 16), 1 << 22), ((8, 4), 3000)]
)
def test_block_scores_are_log_sums_over_pairs_of_cells(scene, cells, limit, monkeypatch):
    # A small limit cuts the scores into many parts.
    monkeypatch.setattr(pooling, "_CPU_SCORE_BYTES", limit)
    q, k, bias, scale = make_inputs(scene)
    found = score_blocks(q, k, scale, 32, 16, *cells, bias)
    assert found.dtype == torch.float32
    group = scene.heads // scene.key_heads
    for b, h in [(0, 0), (scene.batch - 1, scene.heads - 1)]:
        row = None if bias is None else bias[b, 0]
        expected = score_slowly(q[b, h], k[b, h // group], row, scale, 32, 16, *cells)
        torch.testing.assert_close(found[b, h].double(), expected, rtol=1e-5, atol=1e-5)


def test_means_are_over_real_tokens_of_any_stride():
    x = torch.randn(2, 21, 3, 5).transpose(1, 2)
    means = pool_tokens(x.bfloat16(), 8)
    assert means.dtype == torch.float32 and means.shape == (2, 3, 3, 5)
    parts = torch.stack([part.bfloat16().float().mean(2) for part in x.split(8, 2)], 2)
    torch.testing.assert_close(means, parts)


def test_shares_sum_to_one_or_to_nothing():
    scores = torch.tensor([[0.0, 1.0, -torch.inf], [-torch.inf] * 3])
    mass = share_mass(scores)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([1.0, 0.0]))
    assert not mass[0, 2]


def test_cells_that_do_not_divide_a_block_are_refused():
    x = torch.zeros(1, 1, 32, 4)
    with pytest.raises(ValueError, match="Cells of 24 x 16 tokens"):
        score_blocks(x, x, 1.0, 32, 16, 24, 16)
