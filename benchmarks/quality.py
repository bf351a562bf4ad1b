"""What ditopt does to the clips of the demo model, over many prompts.

    python -m benchmarks.quality --prompts N [--steps 20] [--json F] [--checkpoint F] [--resume]
        [--option quality=0.95] [--option dense_steps=0.2] [--plot F]

Each prompt is sampled with Inductor (`dense`) and with ditopt (`default`) from the same noise, two
guidance branches a step, the two taking turns. The JSON file is rewritten after every prompt, so a
long run can be stopped and taken up again with `--resume`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import dit_opt
from benchmarks.attention_mass import measure_mass
from dit_opt.demo import clips, detector
from dit_opt.demo.images import compare_clips
from dit_opt.demo.machine import describe_machine, list_versions, read_date
from dit_opt.demo.model import CHECKPOINT, CheckpointError
from dit_opt.demo.sampler import STEPS
from dit_opt.demo.side_by_side import (
    Contestants,
    Notify,
    Task,
    load_contestants,
    run_interleaved,
    run_steps,
)
from dit_opt.options import OptionError

MASS_PROMPTS = 2
NOISE_PROMPTS = 2
# what must be equal for a run to be taken up again
SETTINGS = ("checkpoint_sha256", "steps", "options", "seed", "versions")


class ResumeError(RuntimeError):
    """A result file cannot be continued with these arguments."""


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from `name=value` pairs; values are Python literals, or else text.

    Raises OptionError for a pair without `=`.
    """
    options = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise OptionError(f"--option {pair!r} must be written name=value, as quality=0.95.")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def measure_prompt(contestants: Contestants, task: Task, notify: Notify) -> dict[str, Any]:
    """Sample one prompt both ways; the row of figures."""
    dit_opt.reset()
    models = {"dense": contestants.inductor, "default": contestants.ditopt}
    runs = run_interleaved(models, task, notify)
    likeness = compare_clips(runs["default"].latents, runs["dense"].latents)
    row: dict[str, Any] = {"prompt": clips.describe(task.prompt), "seed": task.seed}
    for name, run in runs.items():
        row[f"{name}_prompt_score"] = detector.score(run.latents[0].float().cpu(), task.prompt)
        row[f"{name}_seconds_per_step"] = run.total / len(run.seconds)
    row["psnr_db"], row["ssim"] = likeness.psnr_db, likeness.ssim
    row["density"] = dit_opt.report(contestants.ditopt).density
    return row


def measure_noise_floor(contestants: Contestants, task: Task, notify: Notify) -> dict[str, Any]:
    """How far two dense ways to compute the same clip, eager and Inductor, are apart."""
    eager, inductor = (
        run_steps(f"noise floor, {name}", model, task, task.steps, notify).latents
        for name, model in (("eager", contestants.eager), ("inductor", contestants.inductor))
    )
    likeness = compare_clips(eager, inductor)
    return {
        "prompt": clips.describe(task.prompt),
        "seed": task.seed,
        "psnr_db": likeness.psnr_db,
        "ssim": likeness.ssim,
    }


def aggregate(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Means over prompts, and the low end of the PSNR."""
    if not rows:
        return {"dense": {}, "default": {}}

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return statistics.fmean(values) if values else None

    psnr = torch.tensor([row["psnr_db"] for row in rows], dtype=torch.float64)
    out: dict[str, dict[str, float | None]] = {
        name: {
            "prompt_score": mean(f"{name}_prompt_score"),
            "seconds_per_step": mean(f"{name}_seconds_per_step"),
        }
        for name in ("dense", "default")
    }
    out["default"] |= {
        "psnr_db": mean("psnr_db"),
        "psnr_db_min": psnr.min().item(),
        "psnr_db_5th_percentile": psnr.quantile(0.05).item(),
        "ssim": mean("ssim"),
        "density": mean("density"),
        "speedup": sum(row["dense_seconds_per_step"] for row in rows)
        / sum(row["default_seconds_per_step"] for row in rows),
    }
    return out


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start_result(
    settings: dict[str, Any], path: Path | None, resume: bool, device: str
) -> dict[str, Any]:
    """An empty result, or what `path` holds of an earlier run with the same settings.

    Raises ResumeError where the file is missing, damaged or of other settings.
    """
    if not resume:
        return {
            **settings,
            "rows": [],
            "noise_floor": {"rows": []},
            "model": {},
            "machine": describe_machine(device),
        }
    if path is None or not path.exists():
        raise ResumeError("--resume needs --json with the file of the run to take up.")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResumeError(f"{path} is no result file ({error}); leave --resume out.") from error
    for key in SETTINGS:
        if result.get(key) != settings[key]:
            raise ResumeError(
                f"{path} was measured with {key}={result.get(key)}, not {settings[key]}; give "
                "the same arguments, or leave --resume out."
            )
    return result


def save_result(result: dict[str, Any], path: Path | None) -> None:
    """Bring the means up to date and rewrite the file, whole or not at all."""
    result.update(aggregate(result["rows"]), date=read_date(), prompts=len(result["rows"]))
    floor = result["noise_floor"]
    if floor["rows"]:
        floor["psnr_db"] = statistics.fmean(row["psnr_db"] for row in floor["rows"])
        floor["ssim"] = statistics.fmean(row["ssim"] for row in floor["rows"])
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)


def run_benchmark(
    contestants: Contestants,
    result: dict[str, Any],
    tasks: Sequence[Task],
    path: Path | None,
    notify: Notify,
) -> None:
    """Measure what `result` lacks, saving after every prompt."""
    if len(result["rows"]) < len(tasks):
        # no row may hold the seconds of compilation
        cold = contestants.dense_steps(tasks[0].steps) + 2
        for name, model in (("dense", contestants.inductor), ("default", contestants.ditopt)):
            run_steps(f"{name}, cold", model, tasks[0], min(cold, tasks[0].steps), notify)
    if "mass_best_quarter" not in result["model"]:
        prompts = clips.list_prompts(MASS_PROMPTS)
        mass = measure_mass(contestants.eager, prompts, tasks[0].steps)
        result["model"]["mass_best_quarter"] = mass.mean().item()
        save_result(result, path)
    for task in tasks[len(result["noise_floor"]["rows"]) : NOISE_PROMPTS]:
        result["noise_floor"]["rows"].append(measure_noise_floor(contestants, task, notify))
        save_result(result, path)
    for task in tasks[len(result["rows"]) :]:
        result["rows"].append(measure_prompt(contestants, task, notify))
        save_result(result, path)


def render_result(result: dict[str, Any]) -> str:
    """The means as a table."""
    default = result["default"]
    both = [
        [key, result["dense"].get(key), default.get(key)]
        for key in ("prompt_score", "seconds_per_step")
    ]
    alone = [[k, None, v] for k, v in default.items() if k not in result["dense"]]
    rest = [
        [
            "noise floor (eager against Inductor), psnr_db",
            result["noise_floor"].get("psnr_db"),
            None,
        ],
        ["mass_best_quarter", result["model"].get("mass_best_quarter"), None],
    ]
    title = f"{result['prompts']} prompts, {result['steps']} steps, options {result['options']}"
    rows = both + alone + rest
    return f"{title}\n{tabulate(rows, ['', 'dense', 'ditopt'], floatfmt='.4f')}"


def plot_psnr(result: dict[str, Any], path: Path) -> None:
    """PSNR of every prompt, sorted, with the noise floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(sorted(row["psnr_db"] for row in result["rows"]), "o", label="ditopt")
    if "psnr_db" in result["noise_floor"]:
        axes.axhline(result["noise_floor"]["psnr_db"], ls="--", label="eager (noise floor)")
    axes.set(xlabel="prompt, sorted", ylabel="PSNR against Inductor (dB)")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    if args.prompts < 1 or args.steps < 3:
        parser.error("--prompts must be at least 1 and --steps at least 3")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        options = read_options(args.option)
        contestants = load_contestants(args.checkpoint, args.steps, args.device, options)
        settings = {
            "checkpoint_sha256": hash_file(args.checkpoint),
            "steps": args.steps,
            "options": options,
            "seed": args.seed,
            "versions": list_versions(),
        }
        result = start_result(settings, args.json, args.resume, args.device)
    except (CheckpointError, OptionError, ResumeError) as error:
        sys.exit(f"benchmarks.quality: {error}")
    tasks = [
        Task(prompt, args.seed + i, args.steps, device=args.device)
        for i, prompt in enumerate(clips.list_prompts(args.prompts))
    ]
    run_benchmark(contestants, result, tasks, args.json, _print_progress)
    print(render_result(result))
    if args.plot:
        plot_psnr(result, args.plot)


def _print_progress(name: str, done: int, steps: int) -> None:
    if done == steps:
        print(f"{read_date()} {name}: {done} steps", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
