"""The model part: every shape is one that its class takes, and steps are told apart."""

from __future__ import annotations

import contextlib
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


def run_here(call, device):
    return call(), 1.0, 0.0


@pytest.fixture
def tiny(monkeypatch):
    """A shape that is measured without compiling it."""
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)
    monkeypatch.setattr(gpu_models, "_run", run_here)
    monkeypatch.setattr(gpu_models, "_chosen", {})

    def report(density):
        found = type("Report", (), {"density": density})
        monkeypatch.setattr(gpu_models.dit_opt, "report", lambda model: found)

    report(0.25)
    layers = {"num_layers": 1, "num_single_layers": 1}
    shape = dataclasses.replace(SHAPES["Flux"], config=TINY["Flux"], grid=(1, 4, 6), layers=layers)
    return shape, report


def test_a_model_is_measured_step_by_step(tiny):
    row = measure_model(tiny[0], torch.device("cpu"))
    assert row["density"] == 0.25 and row["tokens"] == 24 and row["difference"] == 0
    assert {name: len(times) for name, times in row["times"].items()} == {
        "dense": STEPS,
        "ditopt": STEPS,
    }
    assert row["dense_kernel"] == "CUDNN_ATTENTION" and row["speedup"] == 1


def test_a_model_in_which_nothing_was_replaced_has_no_speed(tiny):
    shape, report = tiny
    report(None)
    row = measure_model(shape, torch.device("cpu"))
    assert "no attention site" in row["refused"] and "speedup" not in row


def test_an_output_that_is_no_number_has_no_speed(tiny, monkeypatch):
    calls = []

    def run(call, device):
        calls.append(1)
        return call() * (torch.nan if len(calls) > 2 * STEPS else 1), 1.0, 0.0

    monkeypatch.setattr(gpu_models, "_run", run)
    row = measure_model(tiny[0], torch.device("cpu"))
    assert "not finite" in row["refused"] and "speedup" not in row


def test_the_fastest_dense_kernel_that_runs_is_taken(tiny, monkeypatch):
    shape, _ = tiny
    model, inputs = build(shape, torch.device("cpu"), torch.float32)
    preferred = []

    def prefer(backend):
        preferred.append(backend.name)
        return contextlib.nullcontext()

    def run(call, device):
        if preferred[-1] == "CUDNN_ATTENTION":
            raise RuntimeError("No execution plans\nmore")
        return None, 2.0 if preferred[-1] == "FLASH_ATTENTION" else 1.0, 0.0

    monkeypatch.setattr(gpu_models, "prefer", prefer)
    monkeypatch.setattr(gpu_models, "_run", run)
    for _ in range(2):
        first, trials = gpu_models.choose_dense(shape, model, inputs, torch.device("meta"))
        assert first.name == "EFFICIENT_ATTENTION"
        assert trials == {
            "CUDNN_ATTENTION": "RuntimeError: No execution plans",
            "FLASH_ATTENTION": 2.0,
            "EFFICIENT_ATTENTION": 1.0,
        }
    # the second time the answer is known
    assert len(preferred) == 3


def test_searches_are_spread_over_the_life_of_a_plan():
    ditopt = [4.0] * STEPS
    ditopt[0], ditopt[1] = 900.0, 800.0
    # what is recorded in a first search is not counted
    ditopt[10], ditopt[SEARCH] = 100.0, 14.0
    found = summarise({"dense": [10.0] * STEPS, "ditopt": ditopt})
    assert found["speedup_of_a_reuse_step"] == pytest.approx(2.5)
    assert found["speedup"] == pytest.approx(10 / 5)
    assert found["cold_seconds"]["ditopt"] == pytest.approx(1.7)
