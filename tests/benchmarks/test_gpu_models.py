"""The model part: every shape is one that its class takes, and steps are told apart."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch

from benchmarks import gpu_models
from benchmarks.gpu_models import SEARCH, STEPS, build, list_shapes, measure_model, summarise

SHAPES = {shape.name: shape for shape in list_shapes()}
TINY = {
    "Wan-14B": {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32},
    "HunyuanVideo": {
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    },
    "Flux": {
        "guidance_embeds": True,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_inputs_fit_a_small_model_of_the_class(name):
    grid = (1, 4, 6) if name == "Flux" else (2, 4, 6)
    shape = dataclasses.replace(SHAPES[name], config=TINY[name], grid=grid)
    model, inputs = build(shape, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        out = model(**inputs, timestep=torch.full((1,), 0.5))[0]
    assert out.shape[:2] == inputs["hidden_states"].shape[:2] and bool(out.isfinite().all())


@pytest.mark.parametrize("name", SHAPES)
def test_the_sizes_are_those_of_the_released_model(name):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = getattr(diffusers, shape.model)(**shape.config, **shape.layers)
    heads = {"Wan-14B": 40, "HunyuanVideo": 24, "Flux": 24}
    assert model.config["num_attention_heads"] == heads[name]
    assert model.config["attention_head_dim"] == 128


def test_a_model_is_measured_step_by_step(monkeypatch, fresh_dynamo):
    ran = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)
    monkeypatch.setattr(gpu_models, "_run", lambda call, device: (ran.append(call()), 1.0)[1:] * 2)
    monkeypatch.setattr(
        gpu_models.dit_opt, "report", lambda model: type("Report", (), {"density": 0.25})
    )
    layers = {"num_layers": 1, "num_single_layers": 1}
    shape = dataclasses.replace(SHAPES["Flux"], config=TINY["Flux"], grid=(1, 4, 6), layers=layers)
    row = measure_model(shape, torch.device("cpu"))
    assert len(ran) == 2 * STEPS and row["density"] == 0.25 and row["tokens"] == 24


def test_searches_are_spread_over_the_life_of_a_plan():
    ditopt = [4.0] * STEPS
    ditopt[0], ditopt[1] = 900.0, 800.0
    # what is recorded in a first search is not counted
    ditopt[10], ditopt[SEARCH] = 100.0, 14.0
    found = summarise({"dense": [10.0] * STEPS, "ditopt": ditopt})
    assert found["speedup_of_a_reuse_step"] == pytest.approx(2.5)
    assert found["speedup"] == pytest.approx(10 / 5)
    assert found["cold_seconds"]["ditopt"] == pytest.approx(1.7)
