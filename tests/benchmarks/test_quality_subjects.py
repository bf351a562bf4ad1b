"""A pipeline of diffusers' own kind, without text encoder and VAE."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import dit_opt
from benchmarks.quality_subjects import Configuration, PipelineSubject, _to_clip
from tests.demo.stubs import ignore
from tests.tiny_models import wan


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
            velocity = self.transformer(**inputs)[0]
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            callback_on_step_end(self, index, timestep, {"latents": latents})
        frames = latents[:, :3].transpose(1, 2).sigmoid()
        return SimpleNamespace(frames=frames)


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


def test_images_are_clips_of_one_frame():
    clip = _to_clip(SimpleNamespace(images=torch.ones(2, 3, 8, 8)))
    assert clip.shape == (1, 3, 1, 8, 8) and clip.max() == 1
