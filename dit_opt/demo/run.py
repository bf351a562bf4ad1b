"""The demo: one prompt sampled eager, with Inductor and with ditopt, and what came out of it.

Everything that `ditopt demo` shows is measured here, in one process, on the spot.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import dit_opt
from dit_opt._compat import BackendCompilerFailed
from dit_opt.demo import clips, detector
from dit_opt.demo.images import (
    AMPLIFY,
    Likeness,
    amplify_difference,
    compare_clips,
    write_contact_sheet,
    write_gif,
)
from dit_opt.demo.machine import describe_run
from dit_opt.demo.side_by_side import (
    Contestants,
    Notify,
    Run,
    Task,
    measure_attention_share,
    run_interleaved,
    run_steps,
)
from dit_opt.inspect.summary import NothingReplaced
from dit_opt.options import OptionError

EAGER_STEPS = 3
# below this, pictures differ visibly and a speedup would be bought with quality
MIN_PSNR_DB = 25.0


class DemoError(RuntimeError):
    """The demo was asked for something that it cannot do."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        task: what was sampled.
        cold: per compiler, the first steps of a sampling, compilation included.
        warm: per way to run, steps of a sampling in which nothing compiles.
        options: what ditopt was asked for, defaults included.
        dense_steps: steps at the start that ditopt ran dense.
        likeness: of ditopt's clip to Inductor's.
        prompt_score: per compiler, what the detector saw of the prompt, in [0, 1].
        attention_share: of an eager step.
        density: realised over sparse steps; None where nothing was replaced.
        layers: per attention site and guidance branch, head types, density and recall.
        compile_cache_hit: whether ditopt's graphs came from Inductor's cache on disk.
        made: machine, versions and date, as `describe_run` tells them.
    """

    task: Task
    cold: dict[str, Run]
    warm: dict[str, Run]
    options: dict[str, Any]
    dense_steps: int
    likeness: Likeness
    prompt_score: dict[str, float]
    attention_share: float
    density: float | None
    layers: list[dict[str, Any]]
    compile_cache_hit: list[bool | None]
    made: dict[str, Any]

    @property
    def speedup(self) -> float:
        """Inductor's seconds over ditopt's for the whole trajectory, warm, dense start included."""
        return self.warm["inductor"].total / self.warm["ditopt"].total

    @property
    def speedup_sparse_steps(self) -> float | None:
        """The same over the steps after the dense start; None where there are none."""
        dense, sparse = (self.warm[n].seconds[self.dense_steps :] for n in ("inductor", "ditopt"))
        return sum(dense) / sum(sparse) if sparse else None

    @property
    def accurate(self) -> bool:
        return self.likeness.psnr_db >= MIN_PSNR_DB

    def to_json(self) -> dict[str, Any]:
        """Everything but the clips, in types that `json.dumps` takes; seconds and dB."""
        seconds = {
            name: {
                "cold": run_cold.summarise()["mean"] if run_cold else None,
                **{f"warm_{k}": v for k, v in run.summarise().items()},
            }
            for name, run in self.warm.items()
            for run_cold in [self.cold.get(name)]
        }
        return {
            "speedup_vs_inductor": self.speedup,
            "speedup_sparse_steps": self.speedup_sparse_steps,
            "psnr_db": self.likeness.psnr_db,
            "ssim": self.likeness.ssim,
            "accurate": self.accurate,
            "density": self.density,
            "attention_share": self.attention_share,
            "seconds_per_step": seconds,
            "cold_steps": {name: len(run.seconds) for name, run in self.cold.items()},
            "steps_seconds": {name: list(run.seconds) for name, run in self.warm.items()},
            "prompt_score": self.prompt_score,
            "prompt": clips.describe(self.task.prompt),
            "seed": self.task.seed,
            "steps": self.task.steps,
            "options": self.options,
            "dense_steps": self.dense_steps,
            "layers": self.layers,
            "compile_cache_hit": self.compile_cache_hit,
            **self.made,
        }


def read_prompt(text: str) -> clips.Prompt:
    """The prompt, or DemoError with what the demo model understands."""
    try:
        return clips.parse_prompt(text)
    except ValueError as error:
        raise DemoError(
            f"{error} An example is 'a red disk moving left and a blue ring moving up'."
        ) from error


def check_device(name: str) -> str:
    """The device's name, or DemoError where this machine does not have it."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DemoError(
            f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}); "
            "try --device cpu."
        ) from error
    if torch.device(name).type not in ("cpu", "cuda"):
        raise DemoError(f"The demo runs on cpu and cuda, not on {name!r}; try --device cpu.")
    return name


def run_demo(contestants: Contestants, task: Task, notify: Notify) -> DemoResult:
    """Sample `task` all three ways. Statistics of earlier ditopt runs are dropped.

    Warm runs of the two compilers take turns step by step. The cold pass before it is long enough
    to compile every graph variant.

    Raises DemoError where the options do not suit the demo model.
    """
    cold_steps = contestants.cold_steps(task.steps)
    compiled = {"inductor": contestants.inductor, "ditopt": contestants.ditopt}
    attention_share = measure_attention_share(contestants.eager, task)
    eager = run_steps("eager", contestants.eager, task, min(EAGER_STEPS, task.steps), notify)
    with _own_errors():
        cold = {
            name: run_steps(f"{name}, cold", model, task, cold_steps, notify)
            for name, model in compiled.items()
        }
    dit_opt.reset()
    warm = run_interleaved(compiled, task, notify)
    report = dit_opt.report(contestants.ditopt)
    return DemoResult(
        task=task,
        cold=cold,
        warm={"eager": eager, **warm},
        options=asdict(contestants.options),
        dense_steps=contestants.dense_steps(task.steps),
        likeness=compare_clips(warm["ditopt"].latents, warm["inductor"].latents),
        prompt_score={
            name: detector.score(run.latents[0].float().cpu(), task.prompt)
            for name, run in warm.items()
        },
        attention_share=attention_share,
        density=report.density,
        layers=[asdict(layer) for graph in report.graphs for layer in graph.layers],
        compile_cache_hit=[graph.warm for graph in report.graphs],
        made=describe_run(task.device),
    )


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Tells what the backend has against its options in a sentence; Dynamo wraps it in a dozen."""
    try:
        yield
    except BackendCompilerFailed as error:
        cause = error.inner_exception
        if isinstance(cause, NothingReplaced):
            raise DemoError(
                "No attention site of the demo model could be replaced, and on_no_match='error' "
                "forbids to go on; leave it out for the reasons."
            ) from error
        if isinstance(cause, OptionError):
            raise DemoError(str(cause)) from error
        raise


def check_outputs(out: Path, json_file: Path | None) -> None:
    """Raise DemoError where the results could not be written, before hours were spent on them."""
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out} is not a folder; name another one.")
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise DemoError(
            f"--json {json_file} cannot be written; name a file in a folder that exists."
        )


def write_outputs(result: DemoResult, out: Path, json_file: Path | None = None) -> list[Path]:
    """Write pictures and report into `out`, all of them or none; returns their paths."""
    text = json.dumps(result.to_json(), indent=1) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    with _workplace(out) as folder:
        _write_pictures(result, folder)
        (folder / "report.json").write_text(text)
        written = [part.replace(out / part.name) for part in sorted(folder.iterdir())]
    if json_file is not None:
        part = json_file.with_name(f"{json_file.name}.part")
        part.write_text(text)
        written.append(part.replace(json_file))
    return written


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder beside the results, on the same file system, which goes away in any case."""
    folder = Path(tempfile.mkdtemp(prefix=".part-", dir=out))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _write_pictures(result: DemoResult, folder: Path) -> None:
    dense, sparse = (result.warm[name].latents for name in ("inductor", "ditopt"))
    likeness = result.likeness
    density = "" if result.density is None else f", density {result.density:.2f}"
    machine, date = result.made["machine"], result.made["date"]
    speedup = (
        f"{result.speedup:.2f}x Inductor's speed over {result.task.steps} steps on "
        f"{machine['device']}, {machine['threads']} threads, {date[:10]}"
    )
    caption = (
        f"ditopt: {result.warm['ditopt'].total:.1f} s, PSNR {likeness.psnr_db:.1f} dB, "
        f"SSIM {likeness.ssim:.3f}{density}"
    )
    rows = [
        (f"Inductor, dense: {result.warm['inductor'].total:.1f} s", dense),
        (caption, sparse),
        (f"difference x{AMPLIFY}", amplify_difference(sparse, dense)),
    ]
    title = [clips.describe(result.task.prompt), speedup]
    write_contact_sheet(folder / "contact_sheet.png", title, rows)
    write_gif(folder / "dense.gif", dense)
    write_gif(folder / "ditopt.gif", sparse)
