"""Every router and both tails through the backend, on real models; nothing is compiled."""

from __future__ import annotations

import pytest
import torch

import dit_opt
from dit_opt.facts.order import OrderRefusal
from dit_opt.facts.order_map import OrderReason
from dit_opt.kernels.searches.headwise.head_orders import ORDER_NAMES
from dit_opt.passes import token_order
from tests.trajectories import (
    big_wan,
    compiled,
    relative_error,
    run_trajectory,
    summary_of,
)
from zoo import small
from zoo.small import wan

pytestmark = pytest.mark.usefixtures("eager")

SPARSE = {"min_tokens": 0, "dense_steps": 1}
# a density is a sum in float32
ROUNDING = 1e-6
KEEP_ALL = {"min_tokens": 0, "dense_steps": 0, "quality": 0.999999}
# Six blocks of queries and twelve of keys, or one more, of which the last ones are not full.
LONG = {make.__name__: {"grid": (3, 14, 18)} for make in small.ALL} | {
    "flux": {"grid": (26, 30)},
    "sd3": {"grid": (26, 30)},
    "dit": {"size": 27},
}


@pytest.fixture
def no_order(monkeypatch):
    """Leaves the gathers at each attention call."""
    refusal = OrderRefusal(OrderReason.NO_GRID)
    monkeypatch.setattr(token_order, "find_order_region", lambda *_: refusal)


def check_searches(tiny, outs, **asked):
    """The steps are dense, search, search and reuse: all but the last answer as if each searched.

    Nobody can tell from random weights how far off an answer may be: see tests/test_known_mass.py.
    """
    torch.compiler.reset()
    dense = run_trajectory(tiny.model, tiny.inputs)
    anew = run_trajectory(compiled(tiny.model, **{**asked, "refresh_every": 1}), tiny.inputs)
    assert relative_error(outs[0], dense[0]) < 1e-6
    assert all(relative_error(o, d) > 1e-3 for o, d in zip(outs[1:], dense[1:]))
    assert all(relative_error(o, a) < 1e-6 for o, a in zip(outs[:3], anew[:3]))
    assert relative_error(outs[3], anew[3]) > 1e-4


@pytest.mark.parametrize(
    ("router", "tail"), [("adaspa", "centroid"), ("subblock", "drop"), ("sol", "drop")]
)
def test_plans_live_from_search_to_search(router, tail):
    tiny = big_wan()
    asked = {"router": router, "tail": tail, "density": 0.5, "refresh_every": 2, **SPARSE}
    outs = run_trajectory(compiled(tiny.model, **asked), tiny.inputs)
    (graph,) = dit_opt.report(tiny.model).graphs
    assert graph.calls == {"dense": 1, "search": 2, "reuse": 1}
    for row in graph.layers:
        assert row.density == pytest.approx(0.5) and row.density < row.recall <= 1
        assert row.heads == {router: 2} and (row.calls, row.searches) == (3, 2)
        # the lists of 2 heads with 6 x 12 blocks: a word of bits for each row
        assert row.plan_bytes == 4 * 2 * 6
    check_searches(tiny, outs, **asked)


@pytest.mark.parametrize(
    ("router", "tail"), [("headwise", "drop"), ("headwise", "centroid"), ("oracle", "drop")]
)
def test_orders_of_heads_live_from_search_to_search(router, tail):
    tiny = big_wan()
    asked = {"router": router, "tail": tail, "density": 0.5, "refresh_every": 2, **SPARSE}
    outs = run_trajectory(compiled(tiny.model, **asked), tiny.inputs)
    (graph,) = dit_opt.report(tiny.model).graphs
    assert graph.calls == {"dense": 1, "search": 2, "reuse": 1}
    assert summary_of(graph.record, "token_order") == ""
    for row in graph.layers:
        assert row.density == pytest.approx(0.5) and row.density < row.recall <= 1
        assert set(row.heads) <= set(ORDER_NAMES) and sum(row.heads.values()) == 2
        # the lists of 2 heads with 6 x 12 blocks, a word of bits for each row, and their orders
        assert row.plan_bytes == 4 * 2 * (6 + 1)
    check_searches(tiny, outs, **asked)


def test_frame_tiles_follow_from_shapes():
    tiny = big_wan()
    model = compiled(tiny.model, router="frame_tile", density=0.6, refresh_every=2, **SPARSE)
    dense = run_trajectory(tiny.model, tiny.inputs)
    outs = run_trajectory(model, tiny.inputs)
    assert all(relative_error(o, d) > 1e-3 for o, d in zip(outs[1:], dense[1:]))
    (graph,) = dit_opt.report(tiny.model).graphs
    # one reference frame of four, and the frames of each block of queries: 36 of 72 blocks
    assert all(row.density == 0.5 and row.plan_bytes == 0 for row in graph.layers)
    assert '"recall": null' in dit_opt.report(tiny.model).to_json()


@pytest.mark.parametrize("name", [f.__name__ for f in small.ALL])
def test_keeping_everything_in_the_order_of_each_head_equals_dense(name):
    tiny = getattr(small, name)(**LONG[name])
    out = tiny(compiled(tiny.model, router="headwise", tail="centroid", **KEEP_ALL))
    torch.testing.assert_close(out, tiny(), rtol=1e-5, atol=1e-5)
    assert dit_opt.report(tiny.model).density == pytest.approx(1)
    replaced = [d for d in dit_opt.report(tiny.model).decisions if d.replaced]
    assert replaced and {d.router for d in replaced} == {"headwise"}


@pytest.mark.parametrize(
    ("name", "tail"),
    [*((f.__name__, "drop") for f in small.ALL), ("wan", "centroid"), ("flux", "centroid")],
)
def test_keeping_everything_in_one_order_equals_dense(name, tail):
    tiny = getattr(small, name)(**LONG[name])
    grid = {} if tiny.grid else {"grid": (1, *LONG[name]["grid"])}
    out = tiny(compiled(tiny.model, router="subblock", tail=tail, **KEEP_ALL, **grid))
    torch.testing.assert_close(out, tiny(), rtol=1e-5, atol=1e-5)
    assert dit_opt.report(tiny.model).density == pytest.approx(1)
    (graph,) = dit_opt.report(tiny.model).graphs
    assert "ordered once" in summary_of(graph.record, "token_order")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (big_wan, {}),
        (lambda: small.hunyuan_video(grid=(4, 12, 16)), {}),
        (lambda: small.cogvideox(grid=(4, 12, 16)), {}),
        (lambda: small.flux(grid=(24, 32)), {"grid": (1, 24, 32)}),
    ],
    ids=["wan", "hunyuan_video", "cogvideox", "flux"],
)
def test_one_order_computes_what_gathers_at_each_call_do(make, options, request, tmp_path):
    asked = {"router": "subblock", "density": 0.5, "min_tokens": 0, "dense_steps": 0, **options}
    tiny = make()
    out = tiny(compiled(tiny.model, dump=str(tmp_path), **asked))
    text = next(tmp_path.rglob("*sparse_attention*after*")).read_text()
    (graph,) = dit_opt.report(tiny.model).graphs
    tables = text.count("_ordered = ")
    # latents, and each table over them, once; the output once
    assert text.count("index_select(") == tables + 1
    assert f"by {tables + 1} gathers" in summary_of(graph.record, "token_order")
    torch.compiler.reset()
    request.getfixturevalue("no_order")
    again = tiny(compiled(tiny.model, **asked))
    torch.testing.assert_close(out, again, rtol=1e-5, atol=1e-5)


def test_a_refused_order_is_reported_and_tokens_are_gathered_at_each_call(no_order):
    tiny = big_wan()
    tiny(compiled(tiny.model, router="subblock", density=0.5, min_tokens=0, dense_steps=0))
    (graph,) = dit_opt.report(tiny.model).graphs
    assert summary_of(graph.record, "token_order").endswith(OrderReason.NO_GRID.value)
    assert "at each attention call" in str(dit_opt.report(tiny.model))
    assert graph.layers[0].density <= 0.5 + ROUNDING


def test_patterns_of_frames_keep_the_models_own_order():
    tiny = big_wan()
    for router in ("rainfusion", "frame_tile"):
        asked = {"router": router, "density": 0.6, "min_tokens": 0, "dense_steps": 0}
        (record,) = dit_opt.explain(tiny.model, **tiny.inputs, options=asked).graphs
        assert "token_order" not in {each.name for each in record.passes}
    asked["router"] = "subblock"
    (record,) = dit_opt.explain(tiny.model, **tiny.inputs, options=asked).graphs
    assert {each.name: each.changed for each in record.passes}["token_order"] == 1


@pytest.mark.parametrize(
    ("numbered", "order"), [(True, "ordered once for the whole graph"), (False, "the grid")]
)
def test_routers_that_weigh_blocks_need_no_grid(numbered, order):
    tiny = small.flux(**LONG["flux"])
    if not numbered:
        tiny.inputs["img_ids"] = torch.rand(26 * 30, 3)
    out = tiny(compiled(tiny.model, router="subblock", **KEEP_ALL))
    torch.testing.assert_close(out, tiny(), rtol=1e-5, atol=1e-5)
    (graph,) = dit_opt.report(tiny.model).graphs
    assert all(row.density == pytest.approx(1) for row in graph.layers)
    assert {d.router for d in graph.record.decisions} == {"subblock"}
    assert order in summary_of(graph.record, "token_order")


@pytest.mark.parametrize(
    ("name", "router"),
    [
        *((n, "rainfusion") for n in ("wan", "hunyuan_video", "cogvideox", "ltx_video", "dit")),
        *((n, "subblock") for n in ("wan", "sd3")),
    ],
)
def test_the_whole_model_tells_its_blocks_the_grid(name, router):
    tiny = getattr(small, name)()
    tiny.model._repeated_blocks = sorted({type(b).__name__ for b in list_blocks(tiny.model)})
    dit_opt.optimize(tiny.model, regional=True, router=router, **KEEP_ALL)
    reference = getattr(small, name)()
    torch.testing.assert_close(tiny(), reference(), rtol=1e-5, atol=1e-5)
    decisions = [d for g in dit_opt.report(tiny.model).graphs for d in g.record.decisions]
    replaced = [d for d in decisions if d.replaced]
    assert replaced and all(d.layout.grid == tiny.grid for d in replaced)
    assert {d.layout.grid_source for d in replaced} == {"model"}


def list_blocks(model):
    """The repeated blocks: what the model's lists of modules hold."""
    lists = [m for m in model.children() if isinstance(m, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def test_a_grid_of_another_resolution_is_told_anew():
    asked = {"router": "rainfusion", "density": 0.6, "min_tokens": 0, "dense_steps": 0}
    tiny, other = big_wan(), wan(grid=(4, 10, 14))
    dit_opt.optimize(tiny.model, regional=True, dynamic=False, **asked)
    for case in (tiny, other, tiny):
        with torch.no_grad():
            tiny.model(**case.inputs)
    found = {
        d.layout.grid
        for g in dit_opt.report(tiny.model).graphs
        for d in g.record.decisions
        if d.replaced
    }
    assert found == {(4, 12, 16), (4, 10, 14)}


def test_the_tail_makes_up_for_some_of_what_is_dropped():
    """With the same plan, out of the same search: an error of each layer alone, on its inputs."""
    tiny = big_wan()
    asked = {"router": "oracle", "density": 0.4, "min_tokens": 0, "dense_steps": 0}
    errors = {}
    for tail in ("drop", "centroid"):
        torch.compiler.reset()
        model = compiled(tiny.model, tail=tail, **asked)
        errors[tail] = relative_error(tiny(model), tiny())
    assert errors["centroid"] < errors["drop"]


@pytest.mark.parametrize("router", ["headwise", "subblock"])
def test_dynamic_sizes_reach_plans_and_orders(router):
    asked = {"router": router, "tail": "centroid", "density": 0.5, "refresh_every": 2, **SPARSE}
    model = compiled(big_wan().model, dynamic=True, **asked)
    for grid in ((4, 12, 16), (4, 10, 14), (4, 12, 16)):
        case = wan(grid=grid)
        outs = run_trajectory(model, case.inputs)
        static = run_trajectory(compiled(case.model, dynamic=False, **asked), case.inputs)
        dense = run_trajectory(case.model, case.inputs)
        torch.testing.assert_close(outs, static, rtol=1e-5, atol=1e-5)
        assert all(relative_error(o, d) > 1e-3 for o, d in zip(outs[1:], dense[1:]))


def test_repeated_blocks_keep_their_lists_apart():
    asked = {"router": "subblock", "density": 0.5, "refresh_every": 2, **SPARSE}
    tiny = big_wan()
    reference = run_trajectory(compiled(tiny.model, **asked), tiny.inputs)
    torch.compiler.reset()
    dit_opt.optimize(tiny.model, regional=True, **asked)
    outs = run_trajectory(tiny.model, tiny.inputs)
    for out, wanted in zip(outs, reference, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    layers = [row.layer for g in dit_opt.report(tiny.model).graphs for row in g.layers]
    assert layers == ["blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_q.weight"]
