"""The search part at toy sizes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_routers
from benchmarks.gpu_routers import DENSITY, list_exact, measure_grid
from dit_opt.options import DEFAULT_REFRESH_EVERY

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


def test_exact_searches_look_at_all_rows_and_reuse_their_sums():
    q, k = torch.randn(2, 1, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    first, again = (call() for call in list_exact(q, k, DENSITY).values())
    assert first[-1].shape == (1, 2, 300)
    assert torch.equal(first[0], again[0]) and torch.allclose(first[-1], again[-1], atol=1e-5)
