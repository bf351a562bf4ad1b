"""What `benchmarks.quality` can sample: the shipped demo model, or a diffusers pipeline."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import dit_opt
from benchmarks.attention_mass import measure_mass
from dit_opt._compat import allow_recompiles
from dit_opt.demo import clips, detector
from dit_opt.demo.side_by_side import (
    Contestants,
    Model,
    Notify,
    Pipeline,
    Run,
    Task,
    compile_pipeline,
    load_contestants,
    run_interleaved,
    run_steps,
)
from dit_opt.inspect.report import Report
from dit_opt.pipeline import DENOISERS, find_denoisers

MASS_PROMPTS = 2


@dataclass(frozen=True)
class Configuration:
    """One way to ask ditopt, by name."""

    name: str
    options: Mapping[str, Any]


class Subject(Protocol):
    """A model that is sampled dense and in every configuration."""

    def warm_up(self, prompt: str, seed: int, notify: Notify) -> None:
        """Compile all there is to compile."""

    def sample(self, prompt: str, seed: int, notify: Notify) -> dict[str, Run]:
        """Runs by name, `dense` first; clips are `[1, 3, T, H, W]` in [-1, 1]."""

    def sample_dense_twice(self, prompt: str, seed: int, notify: Notify) -> tuple[Run, Run]:
        """The same clip eager and with Inductor: how far two dense ways are apart."""

    def read_density(self, name: str) -> float | None:
        """The realised density of a configuration in the last `sample`."""

    def score(self, prompt: str, clip: torch.Tensor) -> float | None:
        """How much of the prompt a clip shows, in [0, 1]; None where nothing can tell."""

    def describe_model(self) -> dict[str, Any]:
        """Figures of the model itself."""


@dataclass(frozen=True)
class DemoSubject:
    """The demo model; its samplings take turns step by step.

    Attributes:
        contestants: eager, Inductor and the first configuration. others: the other ones.
        name: of the first configuration.
    """

    contestants: Contestants
    name: str
    others: Mapping[str, Pipeline]
    steps: int
    device: str
    size: tuple[int, int, int] = (clips.FRAMES, clips.HEIGHT, clips.WIDTH)

    @classmethod
    def load(
        cls, checkpoint: Path, configurations: Sequence[Configuration], steps: int, device: str
    ) -> DemoSubject:
        """Raises CheckpointError and OptionError."""
        # Every configuration is a model of its own, and Dynamo counts them as recompilations.
        allow_recompiles(8 * (len(configurations) + 1))
        first, *rest = configurations
        contestants = load_contestants(checkpoint, steps, device, first.options)
        others = {c.name: compile_pipeline(checkpoint, steps, device, c.options) for c in rest}
        return cls(contestants, first.name, others, steps, device)

    @staticmethod
    def list_prompts(count: int) -> list[str]:
        return [clips.describe(prompt) for prompt in clips.list_prompts(count)]

    @property
    def _models(self) -> dict[str, Model]:
        return {
            "dense": self.contestants.inductor,
            self.name: self.contestants.ditopt,
            **{name: pipeline.transformer for name, pipeline in self.others.items()},
        }

    def _task(self, prompt: str, seed: int) -> Task:
        return Task(clips.parse_prompt(prompt), seed, self.steps, self.size, self.device)

    def warm_up(self, prompt: str, seed: int, notify: Notify) -> None:
        task = self._task(prompt, seed)
        for name, model in self._models.items():
            # a schedule may come to its last variant late
            count = min(2, self.steps) if name == "dense" else self.steps
            run_steps(f"{name}, cold", model, task, count, notify)

    def sample(self, prompt: str, seed: int, notify: Notify) -> dict[str, Run]:
        dit_opt.reset()
        return run_interleaved(self._models, self._task(prompt, seed), notify)

    def sample_dense_twice(self, prompt: str, seed: int, notify: Notify) -> tuple[Run, Run]:
        task = self._task(prompt, seed)
        eager, inductor = (
            run_steps(f"noise floor, {name}", model, task, task.steps, notify)
            for name, model in (
                ("eager", self.contestants.eager),
                ("inductor", self.contestants.inductor),
            )
        )
        return eager, inductor

    def read_density(self, name: str) -> float | None:
        model = self._models[name]
        assert isinstance(model, torch.nn.Module)
        return dit_opt.report(model).density

    def score(self, prompt: str, clip: torch.Tensor) -> float | None:
        return detector.score(clip[0].float().cpu(), clips.parse_prompt(prompt))

    def describe_model(self) -> dict[str, Any]:
        prompts = clips.list_prompts(MASS_PROMPTS)
        mass = measure_mass(self.contestants.eager, prompts, self.steps)
        return {"mass_best_quarter": mass.mean().item()}


class PipelineSubject:
    """A diffusers pipeline; its samplings run one after the other.

    All ways share text encoders and VAE; the denoisers are copies.
    """

    def __init__(
        self, pipeline: Any, configurations: Sequence[Configuration], steps: int, device: str
    ) -> None:
        denoisers = find_denoisers(pipeline)
        allow_recompiles(8 * (len(configurations) + 1) * len(denoisers))
        self._steps, self._device = steps, device
        self._pipelines = {"eager": pipeline, "dense": _share(pipeline)}
        for model in find_denoisers(self._pipelines["dense"]):
            model.compile()
        for configuration in configurations:
            self._pipelines[configuration.name] = shared = _share(pipeline)
            dit_opt.optimize(shared, **configuration.options)

    @classmethod
    def load(
        cls, name: str, configurations: Sequence[Configuration], steps: int, device: str
    ) -> PipelineSubject:
        """Load from the hub or a folder; bfloat16 on accelerators. Raises OSError for no model."""
        from diffusers import DiffusionPipeline

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        pipeline = DiffusionPipeline.from_pretrained(name).to(device, dtype)
        return cls(pipeline, configurations, steps, device)

    def warm_up(self, prompt: str, seed: int, notify: Notify) -> None:
        self.sample(prompt, seed, notify)

    def sample(self, prompt: str, seed: int, notify: Notify) -> dict[str, Run]:
        dit_opt.reset()
        names = [name for name in self._pipelines if name != "eager"]
        return {name: self._run(name, prompt, seed, notify) for name in names}

    def sample_dense_twice(self, prompt: str, seed: int, notify: Notify) -> tuple[Run, Run]:
        eager, dense = (self._run(name, prompt, seed, notify) for name in ("eager", "dense"))
        return eager, dense

    def read_density(self, name: str) -> float | None:
        models = find_denoisers(self._pipelines[name])
        graphs = (graph for model in models for graph in dit_opt.report(model).graphs)
        return Report(tuple(graphs)).density

    def score(self, prompt: str, clip: torch.Tensor) -> float | None:
        return None

    def describe_model(self) -> dict[str, Any]:
        models = find_denoisers(self._pipelines["eager"])
        return {
            "class": ", ".join(dict.fromkeys(type(model).__name__ for model in models)),
            "parameters": sum(p.numel() for model in models for p in model.parameters()),
        }

    def _run(self, name: str, prompt: str, seed: int, notify: Notify) -> Run:
        seconds: list[float] = []
        began = time.perf_counter()

        def tick(pipeline: Any, index: int, timestep: Any, kwargs: dict[str, Any]):
            nonlocal began
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            notify(name, len(seconds), self._steps)
            return kwargs

        with torch.no_grad():
            out = self._pipelines[name](
                prompt=prompt,
                num_inference_steps=self._steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
                callback_on_step_end=tick,
            )
        # The first step's time holds the text encoder.
        return Run(tuple(seconds[1:]), _to_clip(out))


def _share(pipeline: Any) -> Any:
    """A pipeline of the same parts and settings, with denoisers and schedulers of its own."""
    parts = pipeline.components
    # at once, so that what has two names stays one thing
    own = copy.deepcopy({k: parts[k] for k in parts if k in DENOISERS or k.endswith("scheduler")})
    # `components` leaves out what a constructor takes besides, such as Wan 2.2's `boundary_ratio`
    accepted = inspect.signature(type(pipeline)).parameters
    settings = {k: v for k, v in pipeline.config.items() if k in accepted and k not in parts}
    return type(pipeline)(**settings, **{**parts, **own})


def _to_clip(out: Any) -> torch.Tensor:
    """`[1, 3, T, H, W]` in [-1, 1] of a pipeline's result in [0, 1]: `frames [B, T, C, H, W]` or
    `images [B, C, H, W]`."""
    if hasattr(out, "frames"):
        frames = torch.as_tensor(out.frames).transpose(1, 2)
    else:
        frames = torch.as_tensor(out.images).unsqueeze(2)
    return frames[:1].float().cpu() * 2 - 1
