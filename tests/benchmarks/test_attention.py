"""The attention benchmark: its problem, its gate and its JSON, at toy sizes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention
from benchmarks.problems import make_block_mask, make_problem

SMALL = ["--tokens", "300", "--heads", "2", "--dim", "16", "--block", "32", "--seconds", "0"]


def test_lists_meet_the_density_and_differ_from_row_to_row():
    problem = make_problem(1000, 4, 8, 0.25, torch.float32, 32, "cpu")
    assert problem.density() == pytest.approx(0.25, abs=0.005)
    assert len(problem.counts.unique()) >= 5
    steps = problem.indices.diff(dim=-1)
    within = torch.arange(1, 32) < problem.counts.unsqueeze(-1)
    assert bool((steps[within] > 0).all())


def test_the_report_has_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "GRIDS", {300: (3, 10, 10), 64: (4, 4, 4)})
    file = tmp_path / "attention.json"
    assert attention.main([*SMALL, "--no-flex", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    times = report["milliseconds"]
    assert set(times) == {"dense_sdpa", "dense_chunked", attention.OURS}
    assert all(0 < t["min"] <= t["median"] <= t["max"] for t in times.values())
    best = min(times["dense_sdpa"]["median"], times["dense_chunked"]["median"])
    assert report["speedup_vs_best_dense"] == pytest.approx(best / times[attention.OURS]["median"])
    assert report["eta"] == pytest.approx(report["speedup_vs_best_dense"] * report["density"])
    assert report["speedup_vs_flex_attention"] is None
    assert report["router_share"] == report["router_share_by_tokens"]["300"] > 0
    assert {"device", "versions", "date", "threads"} <= set(report)
    assert attention.OURS in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    def wrong(q, *_, **__):
        return 1.01 * q, None

    monkeypatch.setattr(attention, "block_sparse_attention", wrong)
    assert attention.main([*SMALL, "--no-flex", "--no-router"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and attention.OURS in printed.err


def test_the_block_mask_keeps_the_same_blocks():
    problem = make_problem(300, 2, 16, 0.4, torch.float32, 128, "cpu")
    plan = (problem.counts, problem.indices)
    mask = make_block_mask(*plan, (128, 128), 300).to_dense().bool()
    expected = attention.reference.expand_lists(problem.counts, problem.indices, 3)
    assert torch.equal(mask, expected)
