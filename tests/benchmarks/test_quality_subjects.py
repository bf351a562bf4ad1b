"""A pipeline of diffusers' own kind, without text encoder and VAE."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import dit_opt
from benchmarks.quality_subjects import Configuration, PipelineSubject, _to_clip
from tests.demo.stubs import ignore
from zoo.small import wan


class TinyPipeline(DiffusionPipeline):
    """Samples a tiny Wan by the protocol of the video pipelines; a prompt is a seed of text."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, prompt, num_inference_steps, generator, output_type, callback_on_step_end):
        example = wan(grid=(4, 12, 16)).inputs
        shape = example["hidden_states"].shape
        latents = torch.randn(shape, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for index, timestep in enumerate(self.scheduler.timesteps):
            inputs = {**example, "hidden_states": latents, "timestep": timestep.expand(shape[0])}
            velocity = self.predict(**inputs)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            callback_on_step_end(self, index, timestep, {"latents": latents})
        frames = latents[:, :3].transpose(1, 2).sigmoid()
        return SimpleNamespace(frames=frames)

    def predict(self, **inputs):
        return self.transformer(**inputs)[0]


def test_a_diffusers_pipeline_is_sampled_in_every_way(eager, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline = TinyPipeline(wan(grid=(4, 12, 16)).model, scheduler)
    asked = {"router": "subblock", "density": 0.5, "min_tokens": 0, "dense_steps": 1}
    subject = PipelineSubject(pipeline, [Configuration("default", asked)], 3, "cpu")
    subject._pipelines["dense"].transformer.compile(backend="eager")
    runs = subject.sample("a cat", 0, ignore)
    assert list(runs) == ["dense", "default"]
    assert all(len(run.seconds) == 2 for run in runs.values())
    # the same noise, and a plan that drops blocks
    difference = (runs["default"].latents - runs["dense"].latents).abs().max()
    assert 1e-6 < difference < 0.1
    assert runs["dense"].latents.shape == (1, 3, 4, 24, 32)
    assert subject.read_density("default") <= 0.5 + 1e-6
    eager_run, dense = subject.sample_dense_twice("a cat", 0, ignore)
    torch.testing.assert_close(eager_run.latents, dense.latents)
    model = subject.describe_model()
    assert model["class"] == "WanTransformer3DModel" and subject.score("a cat", dense) is None
    # what the user handed in is not compiled
    assert not dit_opt.report(pipeline.transformer).graphs


class TwoDenoiserPipeline(TinyPipeline):
    """Wan 2.2's layout: the second denoiser takes over below a share of the trajectory."""

    _optional_components = ("transformer", "transformer_2")

    def __init__(
        self,
        scheduler,
        vae,
        transformer=None,
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=False,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            scheduler=scheduler, vae=vae, transformer=transformer, transformer_2=transformer_2
        )
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps)

    def predict(self, timestep, **inputs):
        late = timestep < 1000 * self.config.boundary_ratio
        model = self.transformer_2 if late else self.transformer
        return model(timestep=timestep, **inputs)[0]


def make_two(**settings) -> TwoDenoiserPipeline:
    first, second = (wan(grid=(4, 12, 16), layers=1).model for _ in range(2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    # any part that is not a denoiser
    vae = FlowMatchEulerDiscreteScheduler()
    return TwoDenoiserPipeline(scheduler, vae, first, second, **settings)


def test_every_contestant_has_denoisers_of_its_own_and_the_settings_of_all(eager):
    pipeline = make_two(boundary_ratio=0.9, expand_timesteps=True)
    asked = [Configuration("default", {}), Configuration("half", {"density": 0.5})]
    made = PipelineSubject(pipeline, asked, 3, "cpu")._pipelines
    assert list(made) == ["eager", "dense", "default", "half"]
    for name in ("transformer", "transformer_2", "scheduler"):
        assert len({id(getattr(p, name)) for p in made.values()}) == 4
    assert all(p.vae is pipeline.vae for p in made.values())
    assert all(p.config == pipeline.config for p in made.values())
    for name, p in made.items():
        compiled = [m._compiled_call_impl is not None for m in (p.transformer, p.transformer_2)]
        assert compiled == [name != "eager"] * 2


def test_the_density_is_that_of_all_denoisers(eager):
    pipeline = make_two(boundary_ratio=0.9)
    asked = {"router": "subblock", "density": 0.5, "min_tokens": 0, "dense_steps": 0}
    subject = PipelineSubject(pipeline, [Configuration("default", asked)], 3, "cpu")
    for model in (
        subject._pipelines["dense"].transformer,
        subject._pipelines["dense"].transformer_2,
    ):
        model.compile(backend="eager")
    subject.sample("a cat", 0, ignore)
    made = subject._pipelines["default"]
    rows = [
        [row for graph in dit_opt.report(model).graphs for row in graph.layers]
        for model in (made.transformer, made.transformer_2)
    ]
    assert all(rows)
    both = [row for found in rows for row in found]
    mean = sum(row.density * row.calls for row in both) / sum(row.calls for row in both)
    assert subject.read_density("default") == pytest.approx(mean)
    model = subject.describe_model()
    assert model["class"] == "WanTransformer3DModel"
    first = sum(p.numel() for p in pipeline.transformer.parameters())
    assert model["parameters"] == 2 * first


class UnetPipeline(TinyPipeline):
    def __init__(self, unet, scheduler):
        DiffusionPipeline.__init__(self)
        self.register_modules(unet=unet, scheduler=scheduler)

    def predict(self, **inputs):
        return self.unet(**inputs)[0]


class PriorPipeline(TinyPipeline):
    def __init__(self, prior, scheduler):
        DiffusionPipeline.__init__(self)
        self.register_modules(prior=prior, scheduler=scheduler)

    def predict(self, **inputs):
        return self.prior(**inputs)[0]


@pytest.mark.parametrize("kind", [UnetPipeline, PriorPipeline])
def test_a_denoiser_may_have_another_name(eager, kind):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline = kind(wan(grid=(4, 12, 16), layers=1).model, scheduler)
    asked = {"router": "subblock", "density": 0.5, "min_tokens": 0, "dense_steps": 0}
    subject = PipelineSubject(pipeline, [Configuration("default", asked)], 3, "cpu")
    run = subject._run("default", "a cat", 0, ignore)
    assert run.latents.shape == (1, 3, 4, 24, 32)
    assert subject.read_density("default") <= 0.5 + 1e-6
    assert subject.describe_model()["class"] == "WanTransformer3DModel"


def test_images_are_clips_of_one_frame():
    clip = _to_clip(SimpleNamespace(images=torch.ones(2, 3, 8, 8)))
    assert clip.shape == (1, 3, 1, 8, 8) and clip.max() == 1
