"""How long does it take to compile the demo model, whole and by its repeated blocks?

    python -m benchmarks.compile_time [--rounds 3] [--option router=adaspa] [--json F]

Each contestant runs in a process of its own with empty caches: three steps of a trajectory, in
which every variant of its graph is compiled, then the same three steps again. The difference is the
time of compilation. Rounds take turns. The outputs of ditopt's two forms are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate

import dit_opt
from dit_opt.demo import clips
from dit_opt.demo.machine import describe_run
from dit_opt.demo.model import load_model
from dit_opt.options import read_options

CONTESTANTS = ("inductor whole", "inductor regional", "ditopt whole", "ditopt regional")
# The first is dense, the second searches, the third uses its plans: all that the default schedule
# compiles. With dense_steps=0 nothing dense is compiled.
TIMESTEPS = (999.0, 800.0, 600.0)


def compile_model(model: Any, contestant: str, options: dict[str, Any]) -> None:
    """Have the model compiled on its first call."""
    backend, form = contestant.split()
    if backend == "ditopt":
        dit_opt.optimize(model, regional=form == "regional", **options)
    elif form == "regional":
        model.compile_repeated_blocks()
    else:
        model.compile()


@torch.no_grad()
def run_steps(model: torch.nn.Module) -> torch.Tensor:
    """The outputs of a short trajectory on the same noise, `[steps, C, T, H, W]`."""
    generator = torch.Generator().manual_seed(0)
    prompt = clips.list_prompts(1)[0]
    places = clips.locate()[None]
    noise = torch.randn((1, 3, *places.shape[2:]), generator=generator)
    outs = [
        model(
            hidden_states=torch.cat([noise, places], 1),
            timestep=torch.tensor([timestep]),
            encoder_hidden_states=clips.embed([prompt]),
        )[0]
        for timestep in TIMESTEPS
    ]
    return torch.cat(outs)


def measure_here(contestant: str, options: dict[str, Any], out: Path) -> float:
    """Seconds of compilation in this process, whose caches must be empty."""
    model = load_model()
    compile_model(model, contestant, options)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        outputs = run_steps(model)
        seconds.append(time.perf_counter() - began)
    save_file({"outputs": outputs.contiguous()}, out)
    return seconds[0] - seconds[1]


def measure(contestant: str, pairs: list[str]) -> tuple[float, torch.Tensor]:
    """The same in a new process: seconds, and the outputs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "outputs.safetensors")
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-m", "benchmarks.compile_time", "--here", contestant]
        command += ["--out", str(out)] + [f"--option={pair}" for pair in pairs]
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return float(done.stdout.splitlines()[-1]), load_file(out)["outputs"]


def summarise(seconds: dict[str, list[float]], outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Medians, their ratios, and how far the outputs of the two forms are apart."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole, regional = outputs["ditopt whole"], outputs["ditopt regional"]
    return {
        "seconds": seconds,
        "median": medians,
        "regional_vs_inductor": medians["ditopt regional"] / medians["inductor regional"],
        "whole_vs_inductor": medians["ditopt whole"] / medians["inductor whole"],
        "regional_vs_whole_error": float((regional - whole).norm() / whole.norm()),
    }


def render(result: dict[str, Any]) -> str:
    """A row for each contestant, then the ratios."""
    rows = [
        [name, result["median"][name], min(values), max(values)]
        for name, values in result["seconds"].items()
    ]
    ratios = [
        [name, result[name]]
        for name in ("regional_vs_inductor", "whole_vs_inductor", "regional_vs_whole_error")
    ]
    return "\n".join(
        [
            tabulate(rows, ["seconds to compile", "median", "min", "max"], floatfmt=".1f"),
            tabulate(ratios, tablefmt="plain", floatfmt=".3g"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(measure_here(args.here, read_options(args.option), args.out))
        return
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    outputs = {}
    for _ in range(args.rounds):
        for name in CONTESTANTS:
            spent, outputs[name] = measure(name, args.option)
            seconds[name].append(spent)
    result = summarise(seconds, outputs) | {
        "options": args.option,
        **describe_run(),
    }
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
