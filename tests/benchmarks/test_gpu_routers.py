"""The search part at toy sizes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_routers
from benchmarks.gpu_routers import DENSITY, measure_grid, search_exactly
from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.options import DEFAULT_REFRESH_EVERY
from dit_opt.routers.base import BLOCK_K, BLOCK_Q

CPU = torch.device("cpu")


def test_a_grid_has_the_share_of_every_search():
    row = measure_grid((4, 16, 16), CPU, 0.0, heads=2, dim=16)
    times = {name: t["median"] for name, t in row["milliseconds"].items()}
    searches = {"headwise", "adaspa", "subblock", "sol", "rainfusion"}
    assert set(times) == searches | {"dense", "sparse", "moves"}
    share = times["sol"] / times["dense"]
    assert row["share_of_dense"]["sol"] == pytest.approx(share)
    assert row["share_of_dense_per_step"]["sol"] == pytest.approx(share / DEFAULT_REFRESH_EVERY)
    assert "moves" not in row["share_of_dense_per_step"]
    spent = times["sparse"] + times["moves"] + times["headwise"] / DEFAULT_REFRESH_EVERY
    assert row["speedup_with_search"] == pytest.approx(times["dense"] / spent)
    assert 0.4 < row["realised_density"] <= DENSITY


def test_a_search_that_fails_leaves_the_others_their_figures(monkeypatch):
    def fail():
        raise ValueError("no such block")

    whole = gpu_routers.list_searches
    monkeypatch.setattr(gpu_routers, "list_searches", lambda *a: whole(*a) | {"sol": fail})
    row = measure_grid((4, 16, 16), CPU, 0.0, heads=2, dim=16)
    assert row["failed"] == {"sol": "ValueError: no such block"}
    assert "sol" not in row["share_of_dense"] and row["share_of_dense"]["adaspa"] > 0


def test_the_exact_search_knows_the_recall_of_its_plan():
    q, k = torch.randn(2, 1, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    counts, indices, recall, _ = search_exactly(q, k, DENSITY)
    kept = expand_lists(counts, indices, -(-300 // BLOCK_K)).repeat_interleave(BLOCK_K, -1)
    kept = kept.repeat_interleave(BLOCK_Q, -2)[..., :300, :300]
    mass = ((q @ k.mT * 0.25).softmax(-1) * kept).sum(-1).mean(-1)
    torch.testing.assert_close(recall, mass, rtol=1e-4, atol=1e-5)
