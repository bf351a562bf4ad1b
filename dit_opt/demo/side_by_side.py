"""Run the same sampling with several compiled forms of a model and time them fairly.

A shared machine drifts within seconds, so warm runs take turns step by step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import dit_opt
from dit_opt.demo import clips
from dit_opt.demo.model import load_model
from dit_opt.demo.sampler import STEPS, Step, denoise, make_scheduler
from dit_opt.options import Options
from dit_opt.passes.sparse_attention import make_schedule
from dit_opt.program.modes import Mode
from dit_opt.runtime.clock import StepIndex, choose_mode, is_dense

Model = Callable[..., tuple[torch.Tensor, ...]]
# told of the start and of every finished step: the name of the run, steps done, steps in all
Notify = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Task:
    """One clip to sample, whichever the model; the same seed gives the same noise."""

    prompt: clips.Prompt
    seed: int = 0
    steps: int = STEPS
    size: tuple[int, int, int] = (clips.FRAMES, clips.HEIGHT, clips.WIDTH)
    device: str = "cpu"

    def sample(self, model: Model) -> Iterator[Step]:
        return denoise(
            model, self.prompt, self.seed, self.steps, size=self.size, device=self.device
        )


@dataclass(frozen=True)
class Run:
    """Seconds of each step of one sampling, and the clip `[1, 3, T, H, W]` it ended with."""

    seconds: tuple[float, ...]
    latents: torch.Tensor

    @property
    def total(self) -> float:
        return sum(self.seconds)

    def summarise(self) -> dict[str, float]:
        """Mean, median and interquartile range of the seconds of a step."""
        iqr = 0.0
        if len(self.seconds) > 1:
            low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
            iqr = high - low
        return {
            "mean": self.total / len(self.seconds),
            "median": statistics.median(self.seconds),
            "iqr": iqr,
        }


@dataclass
class Pipeline:
    """What `dit_opt.optimize` reads of a diffusers pipeline: the denoiser and its scheduler."""

    transformer: torch.nn.Module
    scheduler: Any


@dataclass(frozen=True)
class Contestants:
    """One model three ways.

    Attributes:
        eager, inductor: share one instance. pipeline: another one, compiled with ditopt.
        options: as ditopt was given them.
    """

    eager: torch.nn.Module
    inductor: Model
    pipeline: Pipeline
    options: Options

    @property
    def ditopt(self) -> torch.nn.Module:
        return self.pipeline.transformer

    def dense_steps(self, steps: int) -> int:
        """How many of `steps` ditopt runs dense at the start."""
        asked = self.options.effective_dense_steps
        return sum(is_dense(index, asked) for index in self._list_indices(steps))

    def cold_steps(self, steps: int) -> int:
        """The first of `steps` steps, in which every graph variant that they need runs once.

        Two after the dense start at least.
        """
        schedule = make_schedule(self.options)
        first: dict[Mode, int] = {}
        for step, index in enumerate(self._list_indices(steps)):
            mode = choose_mode(index, schedule, has_plan=Mode.SEARCH in first)
            first.setdefault(mode, step)
        return min(steps, max(self.dense_steps(steps) + 2, *(i + 1 for i in first.values())))

    def _list_indices(self, steps: int) -> list[StepIndex]:
        """Where each step of a run stands."""
        scheduler = make_scheduler(steps)
        levels = [float(t) / scheduler.config.num_train_timesteps for t in scheduler.timesteps]
        return [
            StepIndex(0, (0, 0), step, 0, level, from_start=True, total=steps)
            for step, level in enumerate(levels)
        ]


def load_contestants(
    checkpoint: Path, steps: int, device: str = "cpu", options: Mapping[str, Any] | None = None
) -> Contestants:
    """Load the demo model twice and set the compilers up; nothing is compiled before a call.

    Raises CheckpointError (see `load_model`) and OptionError.
    """
    parsed = Options.parse(options)
    eager: Any = load_model(checkpoint)
    eager.to(device)
    pipeline = compile_pipeline(checkpoint, steps, device, options)
    return Contestants(eager, torch.compile(eager), pipeline, parsed)


def compile_pipeline(
    checkpoint: Path, steps: int, device: str = "cpu", options: Mapping[str, Any] | None = None
) -> Pipeline:
    """The demo model as a pipeline, set up for ditopt. Raises as `load_contestants` does."""
    scheduler = make_scheduler(steps, device)
    transformer: torch.nn.Module = load_model(checkpoint)
    pipeline = Pipeline(transformer.to(device), scheduler)
    return dit_opt.optimize(pipeline, **(options or {}))


def run_steps(name: str, model: Model, task: Task, steps: int, notify: Notify) -> Run:
    """The first `steps` steps of a sampling; the clip is unfinished unless they are all."""
    notify(name, 0, steps)
    finished: list[Step] = []
    for step in itertools.islice(task.sample(model), steps):
        finished.append(step)
        notify(name, len(finished), steps)
    return Run(tuple(s.seconds for s in finished), finished[-1].latents)


def run_interleaved(models: Mapping[str, Model], task: Task, notify: Notify) -> dict[str, Run]:
    """Whole samplings that take turns: a step of each, another one first every time."""
    names = list(models)
    samplings = {name: task.sample(model) for name, model in models.items()}
    finished: dict[str, list[Step]] = {name: [] for name in names}
    title = " / ".join(names)
    notify(title, 0, task.steps)
    for index in range(task.steps):
        for place in range(len(names)):
            name = names[(index + place) % len(names)]
            finished[name].append(next(samplings[name]))
        notify(title, index + 1, task.steps)
    return {
        name: Run(tuple(s.seconds for s in steps), steps[-1].latents)
        for name, steps in finished.items()
    }


class _TimeAttention(TorchFunctionMode):
    """Adds up the seconds spent in scaled_dot_product_attention."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.seconds = 0.0
        self._device = torch.device(device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        began = self._now()
        out = func(*args, **(kwargs or {}))
        self.seconds += self._now() - began
        return out


def measure_attention_share(model: Model, task: Task) -> float:
    """Share of an eager step that all scaled-dot-product attention (cross-attention too) takes."""
    with _TimeAttention(task.device) as attention:
        step = next(task.sample(model))
    return attention.seconds / step.seconds
