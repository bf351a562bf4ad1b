"""The guard and the side-by-side form through the backend; nothing is compiled."""

from __future__ import annotations

import pytest
import torch

import dit_opt
from tests.trajectories import big_wan, compiled

pytestmark = pytest.mark.usefixtures("eager")

STEPS = [1000.0 - 40 * i for i in range(16)]
ASKED = {"min_tokens": 0, "dense_steps": 1, "refresh_every": 50}


def peaked_wan():
    """A model whose softmax is peaked, so that lists matter."""
    tiny = big_wan()
    for block in tiny.model.blocks:
        block.attn1.norm_q.weight.data *= 8
        block.attn1.to_out[0].weight.data *= 8
    return tiny


def sample(tiny, model):
    """A little Euler sampling."""
    latents = tiny.inputs["hidden_states"].clone()
    timestep = tiny.inputs["timestep"]
    for t in STEPS:
        inputs = {
            **tiny.inputs,
            "hidden_states": latents,
            "timestep": torch.full_like(timestep, t),
        }
        with torch.no_grad():
            latents = latents - 0.04 * model(**inputs)[0]
    return latents


@pytest.mark.parametrize("router", ["rainfusion", "headwise", "subblock", "frame_tile"])
def test_every_router_can_be_guarded(router):
    tiny = peaked_wan()
    options = {**ASKED, "density": 0.6, "router": router, "verify_every": 2}
    out = sample(tiny, compiled(tiny.model, **options))
    assert out.isfinite().all()
    (graph,) = dit_opt.report(tiny.model).graphs
    assert graph.calls["verify"] > 0
    for row in graph.layers:
        assert row.guard.checks == graph.calls["search"] + graph.calls["verify"]
        assert 0.3 < row.guard.kept <= 1 and row.guard.error >= 0
        guard = row.guard
        text = f"kept {guard.kept:.3f}, error {guard.error:.3f}, caught {guard.caught}"
        assert text in str(dit_opt.report(tiny.model))


def test_side_by_side_reports_each_layer_and_step_and_changes_nothing():
    tiny = peaked_wan()
    asked = {**ASKED, "router": "subblock", "density": 0.4, "refresh_every": 2}
    reference = sample(tiny, compiled(tiny.model, **asked))
    torch.compiler.reset()
    model = compiled(tiny.model, **asked, verify=True)
    torch.testing.assert_close(sample(tiny, model), reference, rtol=1e-5, atol=1e-5)
    report = dit_opt.report(tiny.model)
    (graph,) = report.graphs
    for row in graph.layers:
        assert sorted(row.differences) == list(range(1, len(STEPS)))
        assert all(0 < d < 2 for d in row.differences.values())
    text = str(report)
    assert "difference to dense" in text and "step 15" in text
    # every step is far off: the first ones are the worst of a peaked softmax
    assert "consider dense_steps=" in text


def test_dense_beside_dense_differs_by_nothing():
    tiny = peaked_wan()
    asked = {**ASKED, "router": "subblock", "quality": 0.999999, "verify": True}
    sample(tiny, compiled(tiny.model, **asked))
    (graph,) = dit_opt.report(tiny.model).graphs
    assert all(d < 1e-5 for row in graph.layers for d in row.differences.values())
    assert "No step and no layer" in str(dit_opt.report(tiny.model))
