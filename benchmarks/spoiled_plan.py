"""Does the guard catch a plan that went wrong, and does the clip survive it?

    python -m benchmarks.spoiled_plan [--steps 20] [--spoil-at 7] [--verify-every 2] [--json F]

The demo model samples one clip dense and with ditopt by its fast setting, whose plans are searched
once and kept. Then twice more: after some steps the block lists of every layer are dealt out anew
to its query blocks, once with the guard and once without. PSNR is that of the final clip against
the dense one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from dit_opt.demo import clips
from dit_opt.demo.images import compare_clips
from dit_opt.demo.machine import describe_run
from dit_opt.demo.model import CHECKPOINT
from dit_opt.demo.side_by_side import Task, compile_pipeline
from dit_opt.program.slots import Slot
from dit_opt.routers.guard import CAUGHT
from dit_opt.routers.headwise import WORDS
from dit_opt.runtime.registry import live_bounds

# One search in all, so that nothing but the guard can mend a plan.
ONE_SEARCH = {"density": 0.125, "dense_steps": 0, "refresh_every": 1000}


@dataclass(frozen=True)
class Outcome:
    """One sampling: its final PSNR, and the heads that the guard caught in each step, summed."""

    psnr_db: float
    caught: list[float]


def list_values(slot: Slot) -> list[torch.Tensor]:
    """The values of a slot, of every layer and branch of everything that is compiled."""
    return [
        entry.value
        for bound in live_bounds()
        for _, (found, _), _, entry in bound.store
        if found == slot
    ]


def spoil_plans(seed: int = 0) -> int:
    """Deal the lists of all layers out anew to their query blocks, in place; how many layers."""
    generator = torch.Generator().manual_seed(seed)
    values = list_values(WORDS)
    for words in values:
        dealt = torch.randperm(words.shape[2], generator=generator).to(words.device)
        words.copy_(words[:, :, dealt])
    return len(values)


def count_caught() -> float:
    """Heads that were caught so far, over all layers, branches and checks."""
    return sum(float(caught.sum()) for caught in list_values(CAUGHT))


def sample(
    model: Callable[..., Any], task: Task, spoil_at: int | None = None
) -> tuple[torch.Tensor, list[float]]:
    """The clip, and how many heads were caught in each step."""
    caught, before = [], 0.0
    latents = torch.empty(0)
    for step in task.sample(model):
        latents = step.latents
        caught.append(count_caught() - before)
        before += caught[-1]
        if step.index + 1 == spoil_at:
            spoil_plans()
    return latents, caught


def run(task: Task, checkpoint: Path, spoil_at: int, verify_every: int) -> dict[str, Outcome]:
    """Sample in every way; the outcomes by name."""
    guarded = {**ONE_SEARCH, "verify_every": verify_every}
    contestants = {
        "not spoiled": (guarded, None),
        "spoiled, guarded": (guarded, spoil_at),
        "spoiled, no guard": (ONE_SEARCH, spoil_at),
    }
    dense, _ = sample(
        compile_pipeline(checkpoint, task.steps, options={"router": "dense"}).transformer, task
    )
    outcomes = {}
    for name, (options, when) in contestants.items():
        torch.compiler.reset()
        pipeline = compile_pipeline(checkpoint, task.steps, options=options)
        clip, caught = sample(pipeline.transformer, task, when)
        outcomes[name] = Outcome(compare_clips(clip, dense).psnr_db, caught)
    return outcomes


def summarise(outcomes: dict[str, Outcome], spoil_at: int) -> dict[str, Any]:
    """The figures of the issue: steps until the catch, and what the clip lost."""
    whole, guarded = outcomes["not spoiled"], outcomes["spoiled, guarded"]
    extra = [a - b for a, b in zip(guarded.caught, whole.caught)]
    caught_at = next((i for i, n in enumerate(extra) if i >= spoil_at and n > 0), None)
    return {
        "caught_after_steps": None if caught_at is None else caught_at - spoil_at + 1,
        "psnr_lost_db": whole.psnr_db - guarded.psnr_db,
        "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def render(result: dict[str, Any]) -> str:
    """A row for each sampling, then the figures."""
    rows = [
        [name, row["psnr_db"], int(sum(row["caught"]))] for name, row in result["outcomes"].items()
    ]
    return (
        tabulate(rows, ["", "PSNR (dB)", "heads caught"], floatfmt=".2f")
        + f"\ncaught after {result['caught_after_steps']} steps, "
        + f"{result['psnr_lost_db']:.2f} dB lost"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--spoil-at", type=int, default=10, help="after so many steps")
    parser.add_argument("--verify-every", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not 0 < args.spoil_at < args.steps:
        parser.error("--spoil-at must lie within the steps")
    task = Task(clips.list_prompts(1)[0], steps=args.steps)
    outcomes = run(task, args.checkpoint, args.spoil_at, args.verify_every)
    result = summarise(outcomes, args.spoil_at) | {
        "steps": args.steps,
        "spoil_at": args.spoil_at,
        "verify_every": args.verify_every,
        **describe_run(),
    }
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
