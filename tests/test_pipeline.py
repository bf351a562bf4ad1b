from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import dit_opt
from dit_opt import model_probe
from dit_opt.options import OptionError
from dit_opt.pipeline import _Hook, _StepHook
from dit_opt.runtime.bound import WITHOUT_STEP
from dit_opt.runtime.registry import live_bounds
from dit_opt.runtime.scheduler_link import find_link, running_grid, set_running_grid
from tests.trajectories import grids_of
from zoo.small import ltx_video, wan

pytestmark = pytest.mark.usefixtures("eager")

OPTIONS = {"density": 0.6, "min_tokens": 0, "dense_steps": 0, "refresh_every": 1}
DENSE_START = {**OPTIONS, "dense_steps": 0.2}


def make_pipeline(count: int = 1):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    models = [wan(grid=(4, 12, 16)) for _ in range(count)]
    pipe = types.SimpleNamespace(scheduler=scheduler, transformer=models[0].model)
    if count == 2:
        pipe.transformer_2 = models[1].model
    return pipe, models[0].inputs


def run(pipe, inputs, steps, boundary=0.0):
    pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            model = pipe.transformer if t >= boundary else pipe.transformer_2
            model(**{**inputs, "timestep": t.expand(1)})


def calls(model):
    return dit_opt.report(model).graphs[0].calls


@pytest.mark.parametrize("regional", [False, True])
def test_a_share_of_dense_steps_is_one_of_the_noise_range(regional):
    pipe, inputs = make_pipeline()
    assert dit_opt.optimize(pipe, regional=regional, **DENSE_START) is pipe
    run(pipe, inputs, 10)
    layers, dense = 2 if regional else 1, int((pipe.scheduler.timesteps > 800).sum())
    assert 2 < dense < 8
    assert calls(pipe.transformer) == {"dense": dense * layers, "search": (10 - dense) * layers}


def test_a_second_transformer_takes_over_in_the_middle():
    pipe, inputs = make_pipeline(2)
    dit_opt.optimize(pipe, **{**DENSE_START, "dense_steps": 0.05})
    run(pipe, inputs, 10, boundary=900)
    first, second = calls(pipe.transformer), calls(pipe.transformer_2)
    dense = int((pipe.scheduler.timesteps > 950).sum())
    assert first["dense"] == dense > 0
    assert "dense" not in second and first["search"] + second["search"] == 10 - dense


def test_a_module_can_be_compiled_alone():
    tiny = wan()
    dit_opt.optimize(tiny.model, density=1, dense_steps=0, min_tokens=0)
    tiny()
    assert calls(tiny.model) == {"search": 1}


def test_bad_options_are_refused_before_anything_is_touched():
    tiny = wan()
    with pytest.raises(OptionError):
        dit_opt.optimize(tiny.model, densty=0.5)
    assert tiny.model._compiled_call_impl is None


def test_something_without_a_denoiser_is_refused():
    with pytest.raises(TypeError, match="transformer"):
        dit_opt.optimize(types.SimpleNamespace(vae=torch.nn.Linear(1, 1)))


def test_regional_needs_repeated_blocks():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="regional"):
        dit_opt.optimize(model, regional=True)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("router", "make"), [("headwise", ltx_video), ("rainfusion", wan)])
def test_regional_blocks_follow_the_grid_of_each_call(router, make):
    # as many tokens in another aspect ratio, then more tokens
    grids = [(4, 12, 16), (4, 16, 12), (4, 12, 20), (4, 12, 16)]
    tiny = {grid: make(grid=grid) for grid in grids}
    options = {**OPTIONS, "router": router}
    regional, whole = tiny[grids[0]].model, copy.deepcopy(tiny[grids[0]].model)
    dit_opt.optimize(regional, regional=True, **options)
    dit_opt.optimize(whole, **options)
    for i, grid in enumerate(grids):
        inputs = {**tiny[grid].inputs, "timestep": torch.tensor([999.0 - i])}
        with torch.no_grad():
            found, expected = (model(**inputs)[0] for model in (regional, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert grids_of(regional) == set(grids)


def test_threads_of_a_regional_model_keep_their_own_steps():
    tiny = wan(grid=(4, 12, 16))
    dit_opt.optimize(tiny.model, regional=True, **OPTIONS)
    link = find_link(next(tiny.model.parameters()))
    (hook,) = [h for h in tiny.model._forward_pre_hooks.values() if isinstance(h, _StepHook)]
    seen = []

    def step(timestep):
        hook(tiny.model, (), {**tiny.inputs, "timestep": torch.tensor([timestep])})
        seen.append((link.step_index.run, link.step_index.step))

    with ThreadPoolExecutor(1) as other:
        for timestep in (999.0, 800.0):
            step(timestep)
            other.submit(step, timestep).result()
    dit_opt.reset()
    step(700.0)
    here, there, anew = seen[0][0], seen[1][0], seen[4][0]
    assert len({here, there, anew}) == 3
    assert seen == [(here, 0), (there, 0), (here, 1), (there, 1), (anew, 0)]


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_of_a_regional_model_is_an_ordinary_model_and_leaves_the_original_alone(duplicate):
    tiny = wan(grid=(4, 12, 16))
    untouched = copy.deepcopy(tiny.model)
    alone = copy.deepcopy(tiny.model)
    for model in (tiny.model, alone):
        dit_opt.optimize(model, regional=True, **{**OPTIONS, "dense_steps": 2})

    def step(model, timestep):
        with torch.no_grad():
            return model(**{**tiny.inputs, "timestep": torch.tensor([timestep])})[0]

    copied = None
    for timestep in (999.0, 900.0, 800.0, 700.0):
        expected = step(alone, timestep)
        torch.testing.assert_close(step(tiny.model, timestep), expected)
        # made after the first step, when clocks and graphs exist, and called between the others
        copied = copied or duplicate(tiny.model)
        for other in (timestep - 20, timestep - 50):
            torch.testing.assert_close(step(copied, other), step(untouched, other))
    assert calls(tiny.model) == calls(alone) == {"dense": 4, "search": 4}
    assert not dit_opt.report(copied).graphs
    # whoever runs around the copy keeps the grid
    set_running_grid((1, 2, 3))
    step(copied, 600.0)
    assert running_grid() == (1, 2, 3)
    set_running_grid(None)


def test_a_copy_of_a_regional_model_can_be_compiled_itself():
    tiny = wan(grid=(4, 12, 16))
    dit_opt.optimize(tiny.model, regional=True, **OPTIONS)
    whole, regional = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
    options = {**OPTIONS, "dense_steps": 1}
    dit_opt.optimize(whole, fullgraph=True, **options)
    dit_opt.optimize(regional, regional=True, **options)
    for timestep in (999.0, 900.0):
        with torch.no_grad():
            for model in (whole, regional):
                model(**{**tiny.inputs, "timestep": torch.tensor([timestep])})
    assert calls(whole) == {"dense": 1, "search": 1}
    assert calls(regional) == {"dense": 2, "search": 2}
    assert not dit_opt.report(tiny.model).graphs


def test_regional_blocks_are_compiled_for_more_shapes_than_dynamo_allows():
    tiny = wan(grid=(4, 12, 16))
    dit_opt.optimize(tiny.model, regional=True, **OPTIONS)
    for i in range(10):
        with torch.no_grad():
            tiny.model(**{**wan(grid=(2, 8, 8 + i)).inputs, "timestep": torch.tensor([900.0 - i])})
    searched = [bound for bound in live_bounds() if list(bound.store)]
    assert len(searched) == 10


@pytest.fixture
def traces(monkeypatch):
    """The calls in which a whole model is traced."""
    calls = []

    def read_model(model, args, kwargs):
        calls.append(kwargs)
        return original(model, args, kwargs)

    original = model_probe.read_model
    monkeypatch.setattr(model_probe, "read_model", read_model)
    return calls


def rename_arguments(model, forward):
    """Give a model another `forward`, which is called with the plain one before its own."""
    plain = model.forward

    def renamed(*args, **kwargs):
        return forward(plain, *args, **kwargs)

    renamed.__signature__ = inspect.signature(functools.partial(forward, plain))
    model.forward = renamed


REUSING = {**OPTIONS, "dense_steps": 1, "refresh_every": 10}


def run_steps(model, inputs, name="timestep", **others):
    inputs = {key: x for key, x in inputs.items() if key != "timestep"}
    with torch.no_grad():
        for t in (999.0, 750.0, 500.0, 250.0):
            model(**inputs, **{name: torch.tensor([t])}, **others)


@pytest.mark.parametrize("grid", [None, (4, 12, 16)])
def test_the_step_is_found_wherever_it_is(grid):
    tiny = wan(grid=(4, 12, 16))
    rename_arguments(tiny.model, lambda plain, x, texts, **others: plain(x, others["t"], texts[0]))
    dit_opt.optimize(tiny.model, regional=True, grid=grid, **REUSING)
    inputs = {"x": tiny.inputs["hidden_states"], "texts": [tiny.inputs["encoder_hidden_states"]]}
    run_steps(tiny.model, inputs, "t", scale=torch.tensor([5.0]))
    assert calls(tiny.model) == {"dense": 2, "search": 2, "reuse": 4}


def test_a_model_that_embeds_no_step_is_told_of_once(caplog):
    tiny = wan(grid=(4, 12, 16))
    rename_arguments(
        tiny.model,
        lambda plain, step, **others: plain(timestep=torch.tensor([float(step)]), **others),
    )
    dit_opt.optimize(tiny.model, regional=True, **{**OPTIONS, "refresh_every": 10})
    inputs = {key: x for key, x in tiny.inputs.items() if key != "timestep"}
    with caplog.at_level(logging.WARNING, "dit_opt"), torch.no_grad():
        for step in (999, 500):
            tiny.model(step=step, **inputs)
    told = [r.getMessage() for r in caplog.records if "refresh_every=10" in r.getMessage()]
    assert len(told) == 1 and "WanTransformer3DModel" in told[0]
    assert calls(tiny.model) == {"search": 4}


@pytest.mark.parametrize("regional", [False, True])
def test_by_default_a_model_without_a_step_stays_dense_and_says_so(regional, caplog):
    tiny = wan(grid=(4, 12, 16))
    rename_arguments(
        tiny.model,
        lambda plain, step, **others: plain(timestep=torch.tensor([float(step)]), **others),
    )
    inputs = {key: x for key, x in tiny.inputs.items() if key != "timestep"}
    explanation = dit_opt.explain(tiny.model, options={"min_tokens": 0}, step=999, **inputs)
    assert explanation.lacks_step and WITHOUT_STEP in str(explanation)
    assert not dit_opt.explain(
        tiny.model, options={"min_tokens": 0, "dense_steps": 0}, step=999, **inputs
    ).lacks_step
    dit_opt.optimize(tiny.model, regional=regional, dynamic=False, min_tokens=0)
    with caplog.at_level(logging.WARNING, "dit_opt"), torch.no_grad():
        for step in (999, 500):
            tiny.model(step=step, **inputs)
    told = [r.getMessage() for r in caplog.records if r.name.startswith("dit_opt")]
    assert set(told) == {WITHOUT_STEP}
    report = dit_opt.report(tiny.model)
    assert all(g.lacks_step and set(g.calls) == {"dense"} for g in report.graphs)
    assert WITHOUT_STEP in str(report)


def count_runs(model):
    runs = []
    model.patch_embedding.register_forward_hook(lambda *_: runs.append(None))
    return runs


def test_a_call_that_is_to_run_eagerly_runs_once_and_the_grid_is_known_after_it():
    tiny = wan(grid=(4, 12, 16))
    runs = count_runs(tiny.model)
    dit_opt.optimize(tiny.model, regional=True, **OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        tiny()
    assert len(runs) == 1
    tiny()
    assert grids_of(tiny.model) == {(4, 12, 16)}


def test_errors_that_are_suppressed_run_no_model_twice():
    tiny = wan(grid=(4, 12, 16))
    runs = count_runs(tiny.model)
    dit_opt.optimize(tiny.model, regional=True, **OPTIONS)
    with torch._dynamo.config.patch(suppress_errors=True):
        tiny()
    assert len(runs) == 1 and grids_of(tiny.model) == {(4, 12, 16)}


def test_a_number_that_counts_steps_is_no_size(traces):
    tiny = wan(grid=(4, 12, 16))
    rename_arguments(tiny.model, lambda plain, step_index, **others: plain(**others))
    dit_opt.optimize(tiny.model, regional=True, **OPTIONS)
    for i in range(4):
        with torch.no_grad():
            tiny.model(step_index=i, **tiny.inputs)
    assert len(traces) == 2


def test_a_model_may_be_optimized_again(traces):
    tiny = wan(grid=(4, 12, 16))
    for density in (0.6, 0.3):
        dit_opt.optimize(tiny.model, regional=True, **{**OPTIONS, "density": density})
    tiny()
    assert len(traces) == 1
    dit_opt.optimize(tiny.model, **OPTIONS)
    hooks = [*tiny.model._forward_pre_hooks.values(), *tiny.model._forward_hooks.values()]
    assert not [hook for hook in hooks if isinstance(hook, _Hook)]


def test_parameters_may_be_replaced():
    tiny = wan(grid=(4, 12, 16))
    dit_opt.optimize(tiny.model, regional=True, **REUSING)
    run_steps(tiny.model, tiny.inputs)
    weights = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    tiny.model.load_state_dict(weights, assign=True)
    tiny.model.requires_grad_(False)
    dit_opt.reset()
    run_steps(tiny.model, tiny.inputs)
    assert calls(tiny.model) == {"dense": 2, "search": 2, "reuse": 4}
