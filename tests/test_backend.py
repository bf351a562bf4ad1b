"""The backend as a user meets it; a stand-in for Inductor where only state and rules matter."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import dit_opt
from dit_opt.backend import ditopt
from dit_opt.inspect.summary import NothingReplaced
from dit_opt.options import OptionError
from dit_opt.routers.headwise import Headwise
from dit_opt.runtime import compiler
from dit_opt.runtime.bound import GradientError
from tests.trajectories import TRAJECTORY, big_wan, compiled, relative_error, run_trajectory
from zoo import small
from zoo.small import wan

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SPARSE = {
    # Its lists follow from a choice, not from masses that may tie.
    "router": "rainfusion",
    "density": 0.6,
    "min_tokens": 0,
    "dense_steps": 1,
    "refresh_every": 2,
}


def assert_same(outs, references):
    for out, reference in zip(outs, references, strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-6)


def test_the_name_is_an_installed_entry_point():
    from importlib.metadata import entry_points

    found = {e.name: e.value for e in entry_points(group="torch_dynamo_backends")}
    if "ditopt" not in found:
        pytest.skip("ditopt is not installed in this environment")
    assert found["ditopt"] == "dit_opt.backend:ditopt"


@pytest.mark.parametrize(
    "name", ["wan", "hunyuan_video", "cogvideox", "ltx_video", "flux", "sd3", "dit"]
)
def test_keeping_every_block_equals_inductor(name):
    tiny = getattr(small, name)()
    graphs: list[int] = []

    def inductor(gm, inputs):
        from torch._inductor.compile_fx import compile_fx

        graphs.append(1)
        return compile_fx(gm, inputs)

    reference = tiny(torch.compile(tiny.model, backend=inductor))
    torch.compiler.reset()
    out = tiny(compiled(tiny.model, density=1, dense_steps=0, min_tokens=0))
    assert relative_error(out, reference) <= 1e-5
    report = dit_opt.report(tiny.model)
    assert len(report.graphs) == len(graphs)
    assert any(d.replaced for d in report.decisions) and report.density == 1
    assert all(g.calls.get("search") for g in report.graphs if g.record.replaced)


def test_a_dense_step_is_the_graph_that_inductor_would_have_had(monkeypatch):
    seen = []

    def spy(gm, inputs, patches):
        seen.append([n.target for n in gm.graph.nodes if n.op == "call_function"])
        return gm

    monkeypatch.setattr(compiler, "compile_with_inductor", spy)
    tiny = big_wan()
    plain = []

    def record(gm, inputs):
        plain.append([n.target for n in gm.graph.nodes if n.op == "call_function"])
        return gm.forward

    tiny(torch.compile(tiny.model, backend=record))
    torch.compiler.reset()
    tiny.inputs["timestep"] = torch.full((1,), 999.0)
    tiny(compiled(tiny.model, min_tokens=0, dense_steps=1))
    assert seen == plain


def test_sparse_steps_drop_blocks_and_report_it(eager):
    tiny = big_wan()
    model = compiled(tiny.model, **SPARSE)
    dense = run_trajectory(tiny.model, tiny.inputs)
    outs = run_trajectory(model, tiny.inputs)
    assert relative_error(outs[0], dense[0]) < 1e-6
    assert all(relative_error(o, d) > 1e-3 for o, d in zip(outs[1:], dense[1:]))
    report = dit_opt.report(tiny.model)
    assert report.graphs[0].calls == {"dense": 1, "search": 2, "reuse": 1}
    # of the patterns of this grid, the one that keeps 40 of 72 blocks serves each head best
    assert report.density == pytest.approx(40 / 72)
    rows = report.graphs[0].layers
    assert [r.module for r in rows] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert all(r.density == pytest.approx(40 / 72) and r.density < r.recall < 1 for r in rows)
    assert all(sum(r.heads.values()) == 2 and r.calls == 3 and r.searches == 2 for r in rows)
    assert '"reuse": 1' in report.to_json() and "blocks.*.attn1" in str(report)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_one_variant_serves_searches_and_reuse_and_computes_the_same(monkeypatch, regional):
    compiled_graphs = []

    def count(gm, inputs, patches):
        compiled_graphs.append(gm)
        return gm

    monkeypatch.setattr(compiler, "compile_with_inductor", count)
    options = {**SPARSE, "router": "headwise"}
    outs, reports = [], []
    for told in (True, False):
        torch.compiler.reset()
        tiny = big_wan()
        if not told:
            monkeypatch.setattr(Headwise, "switchable", False)
        compiled_graphs.clear()
        dit_opt.optimize(tiny.model, regional=regional, **options)
        outs.append(run_trajectory(tiny.model, tiny.inputs))
        assert len(compiled_graphs) == (2 if told else 3)
        reports.append(dit_opt.report(tiny.model))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    (told,), (apart,) = (report.graphs for report in reports)
    assert told.calls == apart.calls and set(told.calls) == {"dense", "search", "reuse"}
    assert told.layers == apart.layers


@pytest.mark.parametrize(
    "option", [{"verify_every": 1}, {"router": "adaspa"}], ids=["guard", "other router"]
)
def test_others_have_a_variant_for_each_mode(monkeypatch, option):
    compiled_graphs = []

    def count(gm, inputs, patches):
        compiled_graphs.append(gm)
        return gm

    monkeypatch.setattr(compiler, "compile_with_inductor", count)
    tiny = big_wan()
    dit_opt.optimize(tiny.model, **{**SPARSE, "router": "headwise", **option})
    run_trajectory(tiny.model, tiny.inputs)
    assert len(compiled_graphs) == 3


def test_branches_in_turn_are_as_each_alone(eager):
    tiny = big_wan()
    text = torch.randn_like(tiny.inputs["encoder_hidden_states"])
    branches = [tiny.inputs, {**tiny.inputs, "encoder_hidden_states": text}]
    alone = []
    for inputs in branches:
        torch.compiler.reset()
        alone.append(run_trajectory(compiled(tiny.model, **SPARSE), inputs))
    torch.compiler.reset()
    model = compiled(tiny.model, **SPARSE)
    together = [[run_trajectory(model, i, [t])[0] for i in branches] for t in TRAJECTORY]
    for branch in range(2):
        assert_same([row[branch] for row in together], alone[branch])


def test_resolutions_and_batches_in_turn_are_as_each_alone(eager):
    cases = [big_wan(layers=1), wan(grid=(4, 10, 14), layers=1), big_wan(batch=2, layers=1)]
    model = cases[0].model
    alone = []
    for case in cases:
        torch.compiler.reset()
        alone.append(run_trajectory(compiled(model, **SPARSE), case.inputs))
    for dynamic in (None, True, False):
        torch.compiler.reset()
        shared = torch.compile(model, backend=ditopt, dynamic=dynamic, options=SPARSE)
        together = [[run_trajectory(shared, c.inputs, [t])[0] for c in cases] for t in TRAJECTORY]
        for i in range(len(cases)):
            assert_same([row[i] for row in together], alone[i])


def test_a_dynamic_graph_is_told_to_search_or_to_reuse_at_every_resolution(eager):
    options = {**SPARSE, "router": "headwise"}
    cases = [big_wan(layers=1), wan(grid=(4, 10, 14), layers=1)]
    model = cases[0].model
    alone = []
    for case in cases:
        torch.compiler.reset()
        alone.append(run_trajectory(compiled(model, **options), case.inputs))
    torch.compiler.reset()
    shared = compiled(model, dynamic=True, **options)
    together = [[run_trajectory(shared, c.inputs, [t])[0] for c in cases] for t in TRAJECTORY]
    assert dit_opt.report(model).graphs[0].calls == {"dense": 2, "search": 4, "reuse": 2}
    for i in range(len(cases)):
        assert_same([row[i] for row in together], alone[i])


def test_two_models_in_turn_are_as_each_alone(eager):
    first, second = big_wan(layers=1), big_wan(layers=1)
    with torch.no_grad():
        for p in second.model.parameters():
            p.mul_(1.1)
    alone = []
    for tiny in (first, second):
        torch.compiler.reset()
        alone.append(run_trajectory(compiled(tiny.model, **SPARSE), tiny.inputs))
    torch.compiler.reset()
    models = [compiled(t.model, **SPARSE) for t in (first, second)]
    together = [[run_trajectory(m, first.inputs, [t])[0] for m in models] for t in TRAJECTORY]
    for i in range(2):
        assert_same([row[i] for row in together], alone[i])


def test_two_threads_are_as_each_alone(eager):
    tiny = big_wan()
    other = {**tiny.inputs, "hidden_states": torch.randn_like(tiny.inputs["hidden_states"])}
    alone = []
    for inputs in (tiny.inputs, other):
        torch.compiler.reset()
        alone.append(run_trajectory(compiled(tiny.model, **SPARSE), inputs))
    torch.compiler.reset()
    model = compiled(tiny.model, **SPARSE)
    run_trajectory(model, tiny.inputs, [999.0])
    outs: dict[int, list[torch.Tensor]] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: outs.update({i: run_trajectory(model, x)}))
        for i, x in enumerate((tiny.inputs, other))
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(2):
        assert_same(outs[i], alone[i])


def test_offloading_between_steps_changes_nothing(eager):
    tiny = big_wan()
    reference = run_trajectory(compiled(tiny.model, **SPARSE), tiny.inputs)
    torch.compiler.reset()
    model, outs = compiled(tiny.model, **SPARSE), []
    for t in TRAJECTORY:
        outs += run_trajectory(model, tiny.inputs, [t])
        for p in tiny.model.parameters():
            p.data = p.data.clone()
    assert_same(outs, reference)
    assert dit_opt.report(tiny.model).graphs[0].calls["reuse"] == 1


def test_weights_changed_in_place_take_effect(eager):
    tiny = big_wan()
    changed = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(0.01)
    reference = run_trajectory(compiled(changed, **SPARSE), tiny.inputs)
    torch.compiler.reset()
    model = compiled(tiny.model, **SPARSE)
    run_trajectory(model, tiny.inputs)
    with torch.no_grad():
        for p in tiny.model.parameters():
            p.add_(0.01)
    assert_same(run_trajectory(model, tiny.inputs), reference)


def test_new_sizes_recompile_only_as_without_ditopt(eager):
    counts = []
    for backend, options in ((None, None), (ditopt, {"min_tokens": 0, "dense_steps": 0})):
        torch.compiler.reset()
        calls: list[int] = []

        def counting(gm, inputs, calls=calls, backend=backend, options=options):
            calls.append(1)
            return gm.forward if backend is None else backend(gm, inputs, options=options)

        tiny = wan(grid=(3, 4, 5))
        model = torch.compile(tiny.model, backend=counting, dynamic=True)
        for grid in ((3, 4, 5), (4, 6, 8), (5, 12, 16), (2, 20, 14)):
            run_trajectory(model, wan(grid=grid).inputs, [500.0])
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_dynamic_sizes_reach_the_router(eager):
    model = compiled(big_wan().model, dynamic=True, **SPARSE)
    for grid in ((4, 12, 16), (4, 10, 14)):
        case = wan(grid=grid)
        outs = run_trajectory(model, case.inputs)
        static = run_trajectory(compiled(case.model, dynamic=False, **SPARSE), case.inputs)
        dense = run_trajectory(case.model, case.inputs)
        assert_same(outs, static)
        assert all(relative_error(o, d) > 1e-3 for o, d in zip(outs[1:], dense[1:]))


def test_repeated_blocks_keep_their_plans_apart(eager):
    tiny = big_wan()
    reference = run_trajectory(compiled(tiny.model, **SPARSE), tiny.inputs)
    torch.compiler.reset()
    dit_opt.optimize(tiny.model, regional=True, grid=(4, 12, 16), **SPARSE)
    assert_same(run_trajectory(tiny.model, tiny.inputs), reference)
    layers = [row.layer for g in dit_opt.report(tiny.model).graphs for row in g.layers]
    assert layers == ["blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_q.weight"]


def test_a_joint_block_compiled_alone_finds_its_latents_behind_the_text(eager):
    tiny = small.cogvideox(grid=(4, 12, 16))
    options = {"density": 0.6, "min_tokens": 0, "dense_steps": 0}
    reference = run_trajectory(compiled(tiny.model, **options), tiny.inputs, [500.0])
    torch.compiler.reset()
    for block in tiny.model.transformer_blocks:
        block.compile(backend="ditopt", options={**options, "grid": (4, 12, 16)})
    assert_same(run_trajectory(tiny.model, tiny.inputs, [500.0]), reference)
    rows = [row for g in dit_opt.report(tiny.model).graphs for row in g.layers]
    assert len(rows) == 2 and all(0 < row.density <= 0.6 for row in rows)


def test_gradients_are_refused():
    tiny = wan()
    tiny.model.requires_grad_(True)
    with pytest.raises(Exception, match="no_grad") as error:
        compiled(tiny.model)(**tiny.inputs)
    assert isinstance(error.value, GradientError) or "GradientError" in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"denstiy": 0.5}, "density"),
        ({"grid": (3, 4, 6)}, "72 tokens"),
        ({"grid": (5, 4, 3)}, "contradicts"),
    ],
)
def test_wrong_options_name_the_cause(eager, options, message):
    tiny = wan()
    with pytest.raises(Exception, match=message):
        tiny(compiled(tiny.model, min_tokens=0, **options))


def test_an_explicit_router_that_cannot_work_is_an_error(eager):
    tiny = small.flux()
    tiny.inputs["img_ids"] = torch.rand(20, 3)
    with pytest.raises(Exception, match="router='rainfusion' was asked for"):
        tiny(compiled(tiny.model, router="rainfusion", min_tokens=0))
    torch.compiler.reset()
    tiny(compiled(tiny.model, router="rainfusion", min_tokens=0, grid=(1, 4, 5)))


def test_double_precision_is_left_alone_or_refused(eager):
    tiny = wan()
    tiny.model.double()
    for key in ("hidden_states", "encoder_hidden_states"):
        tiny.inputs[key] = tiny.inputs[key].double()
    explanation = dit_opt.explain(tiny.model, options={"min_tokens": 0}, **tiny.inputs)
    assert {d.reason.name for d in explanation.decisions} >= {"UNSUPPORTED_DTYPE"}
    with pytest.raises(OptionError, match="float64"):
        dit_opt.explain(tiny.model, options={"router": "rainfusion"}, **tiny.inputs)


def test_no_match_warns_or_raises_or_is_ignored(eager, caplog):
    tiny = wan()
    tiny(compiled(tiny.model, min_tokens=10_000))
    assert "replaced no attention site" in caplog.text
    torch.compiler.reset()
    with pytest.raises(Exception, match="replaced no attention site") as error:
        tiny(compiled(tiny.model, min_tokens=10_000, on_no_match="error"))
    assert isinstance(error.value, NothingReplaced) or "NothingReplaced" in str(error.value)
    torch.compiler.reset()
    caplog.clear()
    tiny(compiled(tiny.model, min_tokens=10_000, on_no_match="ignore"))
    assert "replaced no attention site" not in caplog.text


def test_reset_forgets_plans_and_steps(eager):
    tiny = big_wan()
    model = compiled(tiny.model, **SPARSE)
    run_trajectory(model, tiny.inputs)
    dit_opt.reset()
    assert not dit_opt.report(tiny.model).graphs
    run_trajectory(model, tiny.inputs, [500.0])
    assert dit_opt.report(tiny.model).graphs[0].calls == {"search": 1}


def test_graphs_are_dumped_before_and_after(eager, tmp_path):
    tiny = big_wan()
    model = compiled(tiny.model, dump=str(tmp_path), **SPARSE)
    run_trajectory(model, tiny.inputs, TRAJECTORY[:2])
    files = sorted(p.name for p in tmp_path.glob("graph_*/*"))
    assert any(f.startswith("00_capture") for f in files)
    (diff,) = tmp_path.glob("graph_*/*sparse_attention.search.diff")
    text = diff.read_text()
    assert "-" in text and "ditopt.block_sparse_attention_v3" in text


def test_a_variant_compiled_on_later_use_keeps_its_static_shapes_and_no_inputs():
    seen = []

    def look(graph):
        values = [n.meta["val"] for n in graph.find_nodes(op="placeholder")]
        seen.append(
            [v for v in values if not isinstance(v, torch.Tensor)]
            + [s for v in values for s in v.shape if not isinstance(s, int)]
        )

    tiny = big_wan(layers=1)
    model = compiled(tiny.model, **SPARSE, inductor={"post_grad_custom_pre_pass": look})
    reference = weakref.ref(tiny.inputs["hidden_states"])
    run_trajectory(model, tiny.inputs)
    assert seen == [[], [], []]
    del tiny.inputs["hidden_states"]
    gc.collect()
    assert reference() is None


def test_a_number_that_changes_does_not_compile_anew_for_each_value():
    tiny, compilations = big_wan(layers=1), []
    base = tiny.model

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = base

        def forward(self, strength: float, **inputs):
            return self.model(**inputs)[0] * strength

    def count(gm, inputs, **kwargs):
        compilations.append(gm)
        return ditopt(gm, inputs, **kwargs)

    options = SPARSE | {"dense_steps": 0}
    model = torch.compile(Scaled(), backend=count, options=options, fullgraph=True)
    with torch.no_grad():
        outs = [model(0.5 + i, **tiny.inputs) for i in range(5)]
    assert len(compilations) <= 2
    torch.testing.assert_close(outs[4] / outs[3], torch.full_like(outs[4], 4.5 / 3.5))


def test_lengths_that_are_padded_in_the_graph(eager):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv = torch.nn.Linear(32, 96).requires_grad_(False)

        def forward(self, x):
            x = torch.nn.functional.pad(x, (0, 0, 0, (-x.shape[1]) % 64))
            q, k, v = (
                y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, -1)
            )
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    base = Padded()
    model = compiled(base, dynamic=True, density=1, min_tokens=0, dense_steps=0)
    for tokens in (130, 300):
        x = torch.randn(1, tokens, 32)
        assert relative_error(model(x), base(x)) < 1e-5
    assert dit_opt.report(base).graphs
