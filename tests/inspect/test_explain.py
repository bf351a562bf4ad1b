from __future__ import annotations

import json

import pytest
import torch

import dit_opt
from dit_opt.options import OptionError
from tests import tiny_models

MODELS = ("wan", "hunyuan_video", "cogvideox", "ltx_video", "flux", "sd3", "dit")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_listed_once_with_its_grid(name):
    tiny = getattr(tiny_models, name)()
    explanation = dit_opt.explain(tiny.model, options={"min_tokens": 0}, **tiny.inputs)
    decisions = explanation.decisions
    assert len(decisions) == tiny.n_sites
    assert len({(d.module, d.site) for d in decisions}) == tiny.n_sites
    assert all(d.module and d.source and d.shapes and d.flops_dense for d in decisions)
    grids = {tuple(map(int, d.layout.grid)) for d in decisions if d.layout and d.layout.grid}
    assert grids == ({tiny.grid} if tiny.grid else set())
    if tiny.grid:
        assert any(d.replaced and d.gain for d in decisions)
    else:
        assert all(d.replaced and "img_ids" in d.detail for d in decisions)
        assert "img_ids" in str(explanation)
        with pytest.raises(OptionError, match="NO_GRID"):
            asked = {"router": "rainfusion", "min_tokens": 0}
            dit_opt.explain(tiny.model, options=asked, **tiny.inputs)


def test_an_explanation_is_json_and_a_table():
    tiny = tiny_models.wan()
    explanation = dit_opt.explain(tiny.model, options={"min_tokens": 0}, **tiny.inputs)
    (graph,) = json.loads(explanation.to_json())["graphs"]
    assert [d["reason"] for d in graph["decisions"]] == ["REPLACED", "CROSS_ATTENTION"] * 2
    assert "blocks.*.attn1" in str(explanation) and "timestep" in str(explanation)


def test_nothing_is_compiled(monkeypatch):
    from dit_opt import backend

    def refuse(*args):
        raise AssertionError("compiled")

    monkeypatch.setattr(backend, "compile_with_inductor", refuse)
    tiny = tiny_models.wan()
    assert dit_opt.explain(tiny.model, **tiny.inputs).decisions


def test_wrong_options_are_errors_of_their_own():
    tiny = tiny_models.wan()
    with pytest.raises(OptionError, match="72 tokens"):
        dit_opt.explain(tiny.model, options={"grid": (3, 4, 6)}, **tiny.inputs)
    with pytest.raises(OptionError, match="quality"):
        dit_opt.explain(tiny.model, options={"qality": 0.5}, **tiny.inputs)
