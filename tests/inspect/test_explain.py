from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch

import dit_opt
from dit_opt.inspect.explain import NothingTraced
from dit_opt.options import OptionError
from dit_opt.runtime import compiler
from tests.trajectories import compiled
from zoo import small

MODELS = ("wan", "hunyuan_video", "cogvideox", "ltx_video", "flux", "sd3", "dit")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_listed_once_with_its_grid(name):
    tiny = getattr(small, name)()
    explanation = dit_opt.explain(tiny.model, options={"min_tokens": 0}, **tiny.inputs)
    decisions = explanation.decisions
    assert len(decisions) == tiny.n_sites
    assert len({(d.module, d.site) for d in decisions}) == tiny.n_sites
    assert all(d.module and d.source and d.shapes and d.flops_dense for d in decisions)
    grids = {tuple(map(int, d.layout.grid)) for d in decisions if d.layout and d.layout.grid}
    # what a graph cannot know, the numbers of its tokens say
    assert grids == {tiny.grid or (1, 4, 5)}
    assert any(d.replaced and d.gain for d in decisions)


def test_numbers_of_tokens_that_tell_no_grid_are_named():
    tiny = small.flux()
    tiny.inputs["img_ids"] = torch.rand(20, 3)
    explanation = dit_opt.explain(tiny.model, options={"min_tokens": 0}, **tiny.inputs)
    assert all(d.replaced and "img_ids" in d.detail for d in explanation.decisions)
    assert "img_ids" in str(explanation)
    with pytest.raises(OptionError, match="NO_GRID"):
        asked = {"router": "rainfusion", "min_tokens": 0}
        dit_opt.explain(tiny.model, options=asked, **tiny.inputs)


def test_an_explanation_is_json_and_a_table():
    tiny = small.wan()
    explanation = dit_opt.explain(tiny.model, options={"min_tokens": 0}, **tiny.inputs)
    (graph,) = json.loads(explanation.to_json())["graphs"]
    assert [d["reason"] for d in graph["decisions"]] == ["REPLACED", "CROSS_ATTENTION"] * 2
    assert "blocks.*.attn1" in str(explanation) and "timestep" in str(explanation)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "flux"])
@pytest.mark.parametrize("router", ["headwise", "subblock"])
def test_explain_and_the_backend_agree(name, router, eager):
    """They run the same passes."""
    tiny = getattr(small, name)()
    options = {"router": router, "min_tokens": 0}
    explained = dit_opt.explain(tiny.model, options=options, **tiny.inputs)
    tiny(compiled(tiny.model, **options))
    (ran,) = (graph.record for graph in dit_opt.report(tiny.model).graphs)
    (told,) = explained.graphs
    assert told.decisions == ran.decisions and told.timestep == ran.timestep
    for one, other in zip(told.passes, ran.passes, strict=True):
        assert replace(one, seconds=other.seconds) == other and one.seconds > 0


def test_nothing_is_compiled(monkeypatch):
    def refuse(*args):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiler, "compile_with_inductor", refuse)
    tiny = small.wan()
    assert dit_opt.explain(tiny.model, **tiny.inputs).decisions


def test_wrong_options_are_errors_of_their_own():
    tiny = small.wan()
    with pytest.raises(OptionError, match="72 tokens"):
        dit_opt.explain(tiny.model, options={"grid": (3, 4, 6)}, **tiny.inputs)
    with pytest.raises(OptionError, match="quality"):
        dit_opt.explain(tiny.model, options={"qality": 0.5}, **tiny.inputs)


class Attention(torch.nn.Module):
    """Breaks the graph in the middle where asked to, as a frame of its own."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 16).requires_grad_(False)
        self.breaks = breaks

    def forward(self, x):
        q = self.project(x)
        x = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        if self.breaks:
            torch._dynamo.graph_break()
        return torch.nn.functional.scaled_dot_product_attention(q, x, x)


class Model(torch.nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.attention = Attention(breaks)

    def forward(self, x):
        return self.attention(x + 1) * 2


def tokens(count: int = 6) -> torch.Tensor:
    return torch.randn(1, 2, count, 16)


def count_graphs(seen):
    """A backend that notes the graphs it is given."""

    def backend(gm, inputs):
        seen.append(gm)
        return gm.forward

    return backend


@pytest.mark.parametrize("breaks", [False, True])
def test_explaining_leaves_nothing_behind(breaks):
    model = Model(breaks)
    for count in range(4, 4 + 11):
        decisions = dit_opt.explain(model, tokens(count)).decisions
        # a size that Dynamo has met before would be a symbol now
        assert breaks or [d.shapes[0] for d in decisions] == [f"[1, 2, {count}, 16]"] * 2
        assert len(decisions) == 2
    assert all(
        not torch._dynamo.eval_frame._debug_get_cache_entry_list(kind.forward.__code__)
        for kind in (Model, Attention)
    )
    seen = []
    torch.compile(model, backend=count_graphs(seen))(tokens())
    assert sum("scaled_dot_product_attention" in gm.code for gm in seen) == 1 + breaks


def test_a_forward_that_is_a_partial_function_is_traced_afresh():
    shapes = []
    for count in (4, 5, 6):
        model = Model()
        # as hooks for offloading replace it
        model.forward = functools.partial(Model.forward, model)
        decisions = dit_opt.explain(model, tokens(count)).decisions
        shapes.append({d.shapes[0] for d in decisions})
    assert shapes == [{f"[1, 2, {count}, 16]"} for count in (4, 5, 6)]


@pytest.mark.parametrize("breaks", [False, True])
def test_what_is_compiled_already_stays(breaks):
    model, seen = Model(breaks), []
    compiled = torch.compile(model, backend=count_graphs(seen))
    compiled(tokens())
    before = len(seen)
    for subject in (model, compiled, compiled):
        assert len(dit_opt.explain(subject, tokens()).decisions) == 2
    compiled(tokens())
    assert len(seen) == before


def test_all_graphs_of_a_model_that_breaks_are_listed():
    explanation = dit_opt.explain(Model(breaks=True), tokens())
    assert [len(g.decisions) for g in explanation.graphs if g.decisions] == [1, 1]


def test_a_model_without_a_graph_is_an_error():
    with pytest.raises(NothingTraced, match=r"no graph of Identity\.forward"):
        dit_opt.explain(torch.nn.Identity(), tokens())
