"""What ditopt does to the videos of a model, over many prompts.

    python -m benchmarks.quality --prompts N [--steps 12] [--json F] [--resume] [--plot F]
        [--option quality=0.95] [--routers adaspa sol --densities 0.25 0.4 --tails drop centroid]
        [--also 'router=rainfusion density=0.2']
        [--pipeline NAME --prompt-file F]

Each prompt is sampled with Inductor (`dense`), with ditopt (`default`, its options from --option),
with every combination of the other lists and as each --also says, from the same noise. On the demo
model the samplings take turns step by step; those of a diffusers pipeline (--pipeline, from the hub
or a folder) run one after the other. The JSON file is rewritten after every prompt, so a long run
can be stopped and taken up again with `--resume`, also with more prompts after the same first ones.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_result import (
    ResumeError,
    plot_pareto,
    render_result,
    save_result,
    start_result,
)
from benchmarks.quality_subjects import Configuration, DemoSubject, PipelineSubject, Subject
from dit_opt.demo.images import compare_clips
from dit_opt.demo.machine import list_versions, read_date
from dit_opt.demo.model import CHECKPOINT, CheckpointError
from dit_opt.demo.side_by_side import Notify, Run
from dit_opt.options import TAILS, Options, list_routers, read_options

NOISE_PROMPTS = 2
# 64 prompts of the demo model then take little more than half an hour on two cores
STEPS = 12


def list_configurations(
    base: dict[str, Any],
    routers: Sequence[str] = (),
    densities: Sequence[float] = (),
    tails: Sequence[str] = (),
    dense_steps: Sequence[float] = (),
    others: Sequence[str] = (),
) -> list[Configuration]:
    """`default`, which is `base`, every combination of what the lists name on top of it, and
    `others`, each a text of `name=value` pairs, also on top of it.

    Raises OptionError where one of them is not valid.
    """
    lists = {"router": routers, "density": densities, "tail": tails, "dense_steps": dense_steps}
    lists = {name: values for name, values in lists.items() if values}
    found = [Configuration("default", base)]
    for values in itertools.product(*lists.values()) if lists else ():
        options = {**base, **dict(zip(lists, values))}
        if "density" in lists:
            options.pop("quality", None)
        Options.parse(options)
        name = " ".join(f"{k}={v}" if k != "router" else v for k, v in zip(lists, values))
        found.append(Configuration(name, options))
    for text in others:
        options = {**base, **read_options(text.split())}
        Options.parse(options)
        found.append(Configuration(text, options))
    return found


def measure_prompt(subject: Subject, prompt: str, seed: int, notify: Notify) -> dict[str, Any]:
    """Sample one prompt in every way; its figures."""
    runs = subject.sample(prompt, seed, notify)
    dense = runs.pop("dense")
    return {
        "prompt": prompt,
        "seed": seed,
        "dense": _describe(subject, prompt, dense),
        "configurations": {
            name: _describe(subject, prompt, run)
            | _compare(run, dense)
            | {"density": subject.read_density(name)}
            for name, run in runs.items()
        },
    }


def _describe(subject: Subject, prompt: str, run: Run) -> dict[str, Any]:
    return {
        "prompt_score": subject.score(prompt, run.latents),
        "seconds_per_step": run.total / len(run.seconds),
    }


def _compare(run: Run, reference: Run) -> dict[str, float]:
    likeness = compare_clips(run.latents, reference.latents)
    return {"psnr_db": likeness.psnr_db, "ssim": likeness.ssim}


def run_benchmark(
    subject: Subject,
    result: dict[str, Any],
    prompts: Sequence[str],
    seed: int,
    path: Path | None,
    notify: Notify,
) -> None:
    """Measure what `result` lacks, saving after every prompt."""
    samples, floor = result["samples"], result["noise_floor"]["samples"]
    if len(samples) < len(prompts):
        # no row may hold the seconds of compilation
        subject.warm_up(prompts[0], seed, notify)
    if not result["model"]:
        result["model"] = subject.describe_model()
        save_result(result, path)
    for index in range(len(floor), min(NOISE_PROMPTS, len(prompts))):
        eager, inductor = subject.sample_dense_twice(prompts[index], seed + index, notify)
        floor.append({"prompt": prompts[index], **_compare(eager, inductor)})
        save_result(result, path)
    for index in range(len(samples), len(prompts)):
        samples.append(measure_prompt(subject, prompts[index], seed + index, notify))
        save_result(result, path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--routers", nargs="+", default=[], choices=list_routers())
    parser.add_argument("--densities", nargs="+", default=[], type=float)
    parser.add_argument("--tails", nargs="+", default=[], choices=TAILS)
    parser.add_argument("--dense-steps", nargs="+", default=[], type=float)
    parser.add_argument(
        "--also", action="append", default=[], metavar="'NAME=VALUE ...'", help="one more row"
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--pipeline", help="a diffusers pipeline instead of the demo model")
    parser.add_argument("--prompt-file", type=Path, help="for --pipeline: a prompt in each line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write the Pareto plot to this PNG")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    if args.prompts < 1 or args.steps < 3:
        parser.error("--prompts must be at least 1 and --steps at least 3")
    if (args.pipeline is None) != (args.prompt_file is None):
        parser.error("--pipeline and --prompt-file belong together")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; install it, or the extra: pip install '.[test]'")
    return args


def load_subject(args: argparse.Namespace) -> tuple[Subject, list[str], dict[str, Any]]:
    """The model, its prompts and the settings that a resumed run must share."""
    configurations = list_configurations(
        read_options(args.option),
        args.routers,
        args.densities,
        args.tails,
        args.dense_steps,
        args.also,
    )
    settings: dict[str, Any] = {
        "steps": args.steps,
        "configurations": {c.name: dict(c.options) for c in configurations},
        "seed": args.seed,
        "versions": list_versions(),
    }
    if args.pipeline is not None:
        prompts = args.prompt_file.read_text().splitlines()
        prompts = [p for p in prompts if p.strip()][: args.prompts]
        subject = PipelineSubject.load(args.pipeline, configurations, args.steps, args.device)
        return subject, prompts, settings | {"pipeline": args.pipeline}
    subject = DemoSubject.load(args.checkpoint, configurations, args.steps, args.device)
    sha = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    return subject, subject.list_prompts(args.prompts), settings | {"checkpoint_sha256": sha}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        subject, prompts, settings = load_subject(args)
        result = start_result(settings, args.json, args.resume, args.device, prompts)
    # an OptionError, or a name that is no pipeline, is a ValueError
    except (CheckpointError, ResumeError, ValueError, OSError) as error:
        sys.exit(f"benchmarks.quality: {error}")
    run_benchmark(subject, result, prompts, args.seed, args.json, _print_progress)
    print(render_result(result))
    if args.plot:
        plot_pareto(result, args.plot)


def _print_progress(name: str, done: int, steps: int) -> None:
    if done == steps:
        print(f"{read_date()} {name}: {done} steps", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
