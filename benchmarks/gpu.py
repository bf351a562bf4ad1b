"""Everything that is measured on a GPU, in one command that can be interrupted.

    python -m benchmarks.gpu --out DIR [--parts attention models] [--only D=128] [--dry-run]
        [--minutes 9]

Parts run one after the other, each in a process of its own and for a time of its own, so that a
kernel that crashes or hangs takes only its part along. Every row is written as soon as it is known,
to DIR/rows.jsonl; a second call goes on where the first one stopped. Measured tilings are kept in
DIR, too. No speed is shown for a kernel whose result is wrong. --dry-run lists what would run and
compiles every kernel ahead of time, for which no GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.crossover import measure_length
from benchmarks.gpu_attention import check_case, measure_case, measure_ceilings
from benchmarks.gpu_cases import Case, list_cases
from benchmarks.gpu_models import list_shapes, measure_model
from benchmarks.gpu_operators import list_checks
from benchmarks.gpu_prologue import SHAPES, measure_prologue
from benchmarks.gpu_routers import GRIDS, measure_grid
from benchmarks.gpu_variants import list_cases as list_variant_cases
from benchmarks.gpu_variants import measure_variants
from benchmarks.lint_kernels import LISTS
from benchmarks.problems import DTYPES
from dit_opt.demo.machine import describe_run
from dit_opt.kernels.aot import check_builds
from dit_opt.routers import AUTO, find_router
from dit_opt.tuning.tune import Workload, tune_kernel

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
ROWS = "rows.jsonl"
# Seconds that each contest is timed for.
SECONDS = 0.3
# Tokens at which the cost model is compared with the clock.
LENGTHS = (2048, 4096, 8192, 16384, 32768)
# (D, N, density, block_k, plan, masked) by dtype; sizes of other dtypes than bfloat16 are fewer, as
# each is compiled for several seconds.
CHECKED = {
    "bfloat16": (
        *(
            Case(dim, tokens, 3, density, block_k=block_k, plan=plan, masked=masked)
            for dim in (128, 64)
            for tokens, density, block_k, plan, masked in (
                (4099, 0.1, 64, "video", False),
                (2048, 0.5, 128, "one dense head", False),
                (2051, 0.3, 64, "random", True),
            )
        ),
        Case(80, 1000, 3, 0.3),
        Case(256, 1000, 3, 0.3),
    ),
    "float16": (Case(128, 1000, 3, 0.3),),
    "float32": (Case(128, 1000, 3, 0.3), Case(64, 1000, 3, 0.3)),
}
# Seconds that a part may take, so that one that hangs leaves time for the others.
LIMITS = {
    "correctness": 90,
    "operators": 60,
    "ceilings": 20,
    "tilings": 90,
    "attention": 150,
    "routers": 60,
    "models": 240,
    "crossover": 40,
    "prologue": 40,
    "variants": 150,
}
HEADERS = {
    "correctness": ("case", "dtype", "relative_error", "passed"),
    "operators": ("case", "agreement", "recall_apart", "relative_error", "passed"),
    "ceilings": ("case", "matmul_tflops", "memory_tb_per_s", "cache_tb_per_s"),
    "tilings": ("case", "milliseconds", "refusals"),
    "attention": (
        "case", "fastest_dense", "dense_tflops", "eta", "eta_vs_default", "speedup",
        "speedup_vs_flex", "refused",
    ),
    "routers": (
        "case", "fastest_dense", "share_of_dense", "share_of_dense_per_step",
        "speedup_with_search", "refused",
    ),
    "models": (
        "case", "dense_kernel", "milliseconds", "speedup_of_a_reuse_step", "speedup", "peak_gib",
        "refused",
    ),
    "crossover": ("case", "gain", "predicted_gain", "refused"),
    "prologue": ("case", "milliseconds", "speedup", "tb_per_s", "refused"),
    # last, since these kernels may hang
    "variants": ("case", "milliseconds", "speedup_vs_plain", "failed", "refused"),
}  # fmt: skip


def list_rows(part: str, device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """What a part measures: the name of each row, and a call that makes it."""
    if part == "correctness":
        return {
            f"{case.name} {name}": partial(check_case, case, dtype, device)
            for name, cases in CHECKED.items()
            for case in cases
            for dtype in [DTYPES[name]]
        }
    if part == "operators":
        return {name: partial(check, device) for name, check in list_checks().items()}
    if part == "ceilings":
        return {"device": partial(measure_ceilings, device)}
    if part == "tilings":
        return {f"D={dim}": partial(measure_tilings, dim, device) for dim in (128, 64)}
    if part == "crossover":
        shape = (24, 128, find_router(AUTO).density, device, SECONDS)
        return {f"N={n} H=24 D=128": partial(measure_length, n, *shape) for n in LENGTHS}
    if part == "attention":
        return {c.name: partial(measure_case, c, device, SECONDS) for c in list_cases()}
    if part == "routers":
        return {
            "x".join(map(str, grid)): partial(measure_grid, grid, device, SECONDS) for grid in GRIDS
        }
    if part == "prologue":
        return {s.name: partial(measure_prologue, s, device, SECONDS) for s in SHAPES}
    if part == "variants":
        cases = list_variant_cases()
        return {c.name: partial(measure_variants, c, device, SECONDS) for c in cases}
    return {shape.case: partial(measure_model, shape, device) for shape in list_shapes()}


def measure_tilings(dim: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of every candidate of a head dimension; the fastest are used from then on."""
    trials, file = tune_kernel([dim], Workload(), device)
    milliseconds, refusals = {}, {}
    for key, found in trials.items():
        for trial in found:
            tiling = trial.tiling
            name = (
                f"{key.rsplit(' ', 1)[-1]} tile {tiling.tile_q}x{tiling.tile_k} "
                f"warps {tiling.num_warps} stages {tiling.num_stages}"
            )
            if trial.milliseconds is None:
                refusals[name] = trial.refused
            else:
                milliseconds[name] = trial.milliseconds
    raw = {key: [dataclasses.asdict(trial) for trial in found] for key, found in trials.items()}
    return {"milliseconds": milliseconds, "refusals": refusals, "trials": raw, "file": str(file)}


def run_part(part: str, out: Path, device: torch.device, only: str = "") -> None:
    """Measure the rows of a part that are not in the file yet, each written when it is known.

    What was refused is tried again, after what was not tried yet. Raises where the device takes no
    more calls after a failure: an illegal access fails all that come after it.
    """
    before = {row["case"]: "refused" in row for row in read_rows(out, part)}
    rows = {name: call for name, call in list_rows(part, device).items() if only in name}
    new = [name for name in rows if name not in before]
    for name in [*new, *(name for name in rows if before.get(name))]:
        log.info("%s: %s", part, name)
        try:
            row = rows[name]()
        except Exception as error:
            log.exception("%s: %s failed", part, name)
            row = {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
        row = {"part": part, "case": name} | row | read_state(device)
        with (out / ROWS).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def read_state(device: torch.device) -> dict[str, Any]:
    """When a row was measured, on what, and how hot and fast that was."""
    state: dict[str, Any] = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_device_name(device)
        for name in ("clock_rate", "temperature", "power_draw"):
            try:
                state[name] = getattr(torch.cuda, name)(device)
            except (ModuleNotFoundError, RuntimeError) as error:
                log.debug("%s cannot be read: %s", name, error)
    return state


def read_rows(out: Path, part: str) -> list[dict[str, Any]]:
    """The rows that a part has written so far, of each case the last one."""
    file = out / ROWS
    if not file.exists():
        return []
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["part"] == part]
    return list({row["case"]: row for row in rows}.values())


def run_parts(
    parts: Sequence[str], out: Path, device: str, minutes: float, only: str = ""
) -> dict[str, str]:
    """Each part in a process of its own; why a part is not complete, by part.

    The processes are forks, which have imported everything; nothing here touches the device. One
    that dies is started again as long as it adds rows.
    """
    context = multiprocessing.get_context("fork")
    end = time.monotonic() + 60 * minutes
    stopped = {}
    for part in parts:
        until = min(end, time.monotonic() + LIMITS[part])
        known = -1
        while known < len(read_rows(out, part)):
            known = len(read_rows(out, part))
            stopped.pop(part, None)
            process = context.Process(target=run_part, args=(part, out, torch.device(device), only))
            process.start()
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                # a driver that hangs keeps even a killed process
                process.join(10)
                stopped[part] = "its time is over; call again to go on"
                break
            if process.exitcode == 0:
                break
            stopped[part] = f"its process ended with status {process.exitcode}"
    return stopped


def render(results: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each part; of a figure by name, all of it."""
    tables = []
    for part, rows in results.items():
        names = HEADERS[part]
        cells = [[_as_text(row.get(name)) for name in names] for row in rows]
        tables.append(f"{part}\n{tabulate(cells, names)}")
    return "\n\n".join(tables)


def _as_text(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_as_text(x)}" for name, x in value.items())
    return value


def compile_kernels(target: str = "sm_90") -> int:
    """Compile every shipped kernel ahead of time; how many have faults."""
    rows = list(check_builds([build for listed in LISTS for build in listed(target)]))
    faults = [(build.config, ", ".join(found)) for build, _, found in rows if found]
    log.info("%d kernels compiled for %s, %d with faults", len(rows), target, len(faults))
    if faults:
        print(tabulate(faults, ["kernel", "faults"]))
    return len(faults)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit status is 1 where a part is not complete or a row is refused."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = read_arguments(arguments)
    if options.dry_run:
        rows = [[part, name] for part in options.parts for name in list_rows(part, CPU)]
        print(tabulate(rows, ["part", "row"]))
        return 1 if compile_kernels() else 0
    options.out.mkdir(parents=True, exist_ok=True)
    # tilings that are measured here come back with the rows
    os.environ.setdefault("DITOPT_CACHE_DIR", str(options.out.resolve()))
    stopped = run_parts(options.parts, options.out, options.device, options.minutes, options.only)
    results = {part: read_rows(options.out, part) for part in options.parts}
    report = {
        **describe_run(options.device),
        "incomplete": stopped,
        "rows": results,
    }
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(render(results))
    for part, reason in stopped.items():
        print(f"{part} is not complete: {reason}.", file=sys.stderr)
    rows = itertools.chain(*results.values())
    refused = [row for row in rows if "refused" in row or row.get("passed") is False]
    return 1 if stopped or refused else 0


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(HEADERS), default=list(HEADERS))
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
