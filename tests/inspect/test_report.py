"""Reports are read from the slots of what ran; nothing is compiled."""

from __future__ import annotations

import gc
import json

import pytest
import torch

import dit_opt
from dit_opt.routers import ROUTERS, find_router
from tests.trajectories import big_wan, compiled, run_trajectory
from zoo.small import wan

pytestmark = pytest.mark.usefixtures("eager")

OPTIONS = {"min_tokens": 0, "dense_steps": 1, "refresh_every": 2, "density": 0.6}


def run(router="rainfusion", timesteps=(999.0, 750.0, 500.0, 250.0), **options):
    tiny = big_wan()
    model = compiled(tiny.model, **{**OPTIONS, "router": router, **options})
    run_trajectory(model, tiny.inputs, timesteps)
    return tiny.model, model


@pytest.mark.parametrize("router", [router.name for router in ROUTERS])
def test_every_pass_that_ran_says_what_it_changed_and_how_long_it_took(router):
    model, _ = run(router)
    report = dit_opt.report(model)
    (graph,) = json.loads(report.to_json())["graphs"]
    records = {record["name"]: record for record in graph["passes"]}
    cube_order = find_router(router).cube_order
    expected = {"canonicalize_attention": 0, "sparse_attention": 2}
    if cube_order:
        expected["token_order"] = 1
    assert {name: record["changed"] for name, record in records.items()} == expected
    assert all(record["seconds"] > 0 for record in records.values())
    summary = records["token_order"]["summary"] if cube_order else "no order"
    assert ("ordered once for the whole graph" in summary) is cube_order
    assert [d["reason"] for d in graph["decisions"]] == ["REPLACED", "CROSS_ATTENTION"] * 2
    assert graph["calls"] == {"dense": 1, "search": 2, "reuse": 1}
    layers = graph["layers"]
    assert [layer["module"] for layer in layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    for layer in layers:
        # the parameter that identifies it is its own
        assert layer["layer"].startswith(layer["module"])
        assert (layer["calls"], layer["searches"]) == (3, 2)
        assert 0 < layer["density"] <= 0.6 + 1e-6
        assert sum(layer["heads"].values()) == 2
        assert set(layer["density_by_type"]) == set(layer["heads"])


def test_memory_is_that_of_the_slots():
    model, _ = run("headwise")
    (graph,) = dit_opt.report(model).graphs
    # two layers of two heads: 6 x 12 blocks are a word of bits for each row
    statistic = 4 * 2 * 2
    assert graph.slot_bytes == {
        "headwise.words": 6 * statistic,
        "headwise.order": statistic,
        "attention.recall": statistic,
        "attention.plan_density": statistic,
        "attention.density": statistic,
    }
    assert [layer.plan_bytes for layer in graph.layers] == [4 * 2 * (6 + 1)] * 2


def test_branches_have_rows_of_their_own():
    tiny = big_wan(layers=1)
    model = compiled(tiny.model, **OPTIONS, router="rainfusion")
    for t in (999.0, 750.0, 500.0):
        for _ in range(2):
            run_trajectory(model, tiny.inputs, (t,))
    (graph,) = dit_opt.report(tiny.model).graphs
    assert [(row.branch, row.calls) for row in graph.layers] == [(0, 2), (1, 2)]


def test_a_report_is_of_one_model_alone():
    first, second = big_wan(layers=1), big_wan(layers=1)
    for tiny in (first, second):
        run_trajectory(compiled(tiny.model, **OPTIONS, router="rainfusion"), tiny.inputs)
    for tiny in (first, second):
        (graph,) = dit_opt.report(tiny.model).graphs
        assert graph.calls == {"dense": 1, "search": 2, "reuse": 1} and len(graph.layers) == 1
    (alone,) = dit_opt.report(second.model).graphs
    del first
    gc.collect()
    assert dit_opt.report(second.model).graphs == (alone,)


def test_the_compiled_model_is_the_model():
    model, wrapped = run("rainfusion")
    names = [
        row.layer.removeprefix("_orig_mod.") for row in dit_opt.report(wrapped).graphs[0].layers
    ]
    assert names == [row.layer for row in dit_opt.report(model).graphs[0].layers]


def test_a_router_that_knows_no_recall_reports_none():
    (graph,) = dit_opt.report(run("frame_tile")[0]).graphs
    assert [row.recall for row in graph.layers] == [None, None]
    (graph,) = dit_opt.report(run("adaspa")[0]).graphs
    assert all(row.density < row.recall <= 1 for row in graph.layers)


def test_keeping_everything_is_a_density_of_one():
    tiny = wan()
    model = compiled(tiny.model, density=1, min_tokens=0, dense_steps=0)
    assert dit_opt.report(tiny.model).density is None
    tiny(model)
    report = dit_opt.report(tiny.model)
    assert report.density == 1 and report.graphs[0].layers == ()


def test_the_density_is_the_mean_over_sparse_calls():
    model, _ = run("rainfusion")
    report = dit_opt.report(model)
    rows = report.graphs[0].layers
    assert report.density == pytest.approx(sum(row.density for row in rows) / 2)
    assert json.loads(report.to_json())["density"] == report.density


def test_a_model_that_did_not_run_has_no_graphs():
    report = dit_opt.report(torch.nn.Linear(2, 2))
    assert report.graphs == () and report.density is None and report.decisions == ()
    assert "has not run under ditopt" in str(report)
