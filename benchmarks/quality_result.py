"""The result of `benchmarks.quality`: means over prompts, file, table and plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from dit_opt.demo.machine import describe_machine, read_date

# what must be equal for a run to be taken up again, with device and prompts
SETTINGS = ("checkpoint_sha256", "pipeline", "steps", "configurations", "seed", "versions")
COLUMNS = (
    "psnr_db",
    "psnr_db_min",
    "ssim",
    "prompt_score",
    "density",
    "seconds_per_step",
    "speedup",
)


class ResumeError(RuntimeError):
    """A result file cannot be continued with these arguments."""


def aggregate(samples: Sequence[dict[str, Any]], configurations: dict[str, Any]) -> dict[str, Any]:
    """Means over prompts: `dense`, `default`, and a row for each configuration."""
    if not samples:
        return {"dense": {}, "default": {}, "rows": []}
    dense = [s["dense"] for s in samples]
    seconds = sum(d["seconds_per_step"] for d in dense)
    rows = []
    for name, options in configurations.items():
        found = [s["configurations"][name] for s in samples]
        psnr = torch.tensor([f["psnr_db"] for f in found], dtype=torch.float64)
        rows.append(
            {
                "name": name,
                "options": options,
                "prompt_score": _mean(found, "prompt_score"),
                "psnr_db": _mean(found, "psnr_db"),
                "psnr_db_min": psnr.min().item(),
                "psnr_db_5th_percentile": psnr.quantile(0.05).item(),
                "ssim": _mean(found, "ssim"),
                "density": _mean(found, "density"),
                "seconds_per_step": _mean(found, "seconds_per_step"),
                "speedup": seconds / sum(f["seconds_per_step"] for f in found),
            }
        )
    return {
        "dense": {k: _mean(dense, k) for k in ("prompt_score", "seconds_per_step")},
        "default": {k: v for k, v in rows[0].items() if k != "name"},
        "rows": rows,
    }


def _mean(found: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [f[key] for f in found if f[key] is not None]
    return statistics.fmean(values) if values else None


def start_result(
    settings: dict[str, Any], path: Path | None, resume: bool, device: str, prompts: Sequence[str]
) -> dict[str, Any]:
    """An empty result, or what `path` holds of an earlier run with the same settings and device,
    whose prompts are the first of `prompts`.

    Raises ResumeError where the file is missing, damaged or of another run.
    """
    if not resume:
        return {
            **settings,
            "samples": [],
            "noise_floor": {"samples": []},
            "model": {},
            "machine": describe_machine(device),
        }
    if path is None or not path.exists():
        raise ResumeError("--resume needs --json with the file of the run to take up.")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResumeError(f"{path} is no result file ({error}); leave --resume out.") from error
    differences = list(_list_differences(result, settings, device, prompts))
    if differences:
        raise ResumeError(
            f"{path} was measured with {', and '.join(differences)}; give the same arguments, or "
            "leave --resume out."
        )
    return result


def _list_differences(
    result: dict[str, Any], settings: dict[str, Any], device: str, prompts: Sequence[str]
) -> Iterator[str]:
    """What a file holds and what was asked for instead; of its prompts, the first other one."""
    wanted = json.loads(json.dumps(settings))
    for key in SETTINGS:
        if result.get(key) != wanted.get(key):
            yield f"{key}={result.get(key)}, not {settings.get(key)}"
    found, asked = result.get("machine", {}).get("device"), str(torch.device(device))
    if found != asked:
        yield f"device={found}, not {asked}"
    # the noise floor is measured first, so a run that was stopped early has only that
    measured = max(
        result.get("samples", []), result.get("noise_floor", {}).get("samples", []), key=len
    )
    for index, sample in enumerate(measured):
        if index == len(prompts):
            yield f"{len(measured)} prompts, not {len(prompts)}"
        elif index < len(prompts) and sample["prompt"] != prompts[index]:
            yield f"prompt {index + 1} {sample['prompt']!r}, not {prompts[index]!r}"
            return


def save_result(result: dict[str, Any], path: Path | None) -> None:
    """Bring the means up to date and rewrite the file, whole or not at all."""
    result.update(
        aggregate(result["samples"], result["configurations"]),
        date=read_date(),
        prompts=len(result["samples"]),
    )
    floor = result["noise_floor"]
    if floor["samples"]:
        floor["psnr_db"] = _mean(floor["samples"], "psnr_db")
        floor["ssim"] = _mean(floor["samples"], "ssim")
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)


def render_result(result: dict[str, Any]) -> str:
    """The means as a table: dense, the noise floor, and every configuration."""
    dense, floor = result["dense"], result["noise_floor"]
    rows = [
        ["dense (Inductor)", *(dense.get(c) for c in COLUMNS)],
        ["dense, eager (noise floor)", *(floor.get(c) for c in COLUMNS)],
        *([row["name"], *(row[c] for c in COLUMNS)] for row in result["rows"]),
    ]
    model = ", ".join(f"{k} {v}" for k, v in result["model"].items())
    title = f"{result['prompts']} prompts, {result['steps']} steps; model: {model}"
    return f"{title}\n{tabulate(rows, ['', *COLUMNS], floatfmt='.4f')}"


def plot_pareto(result: dict[str, Any], path: Path) -> None:
    """PSNR of every configuration against its density and against its speedup, with the front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, key, better in zip(figure.subplots(1, 2), ("density", "speedup"), (-1, 1)):
        points = [row for row in result["rows"] if row[key] is not None]
        middle = (max(row[key] for row in points) + min(row[key] for row in points)) / 2
        for row in points:
            color, marker = _style(row, points)
            axes.plot(row[key], row["psnr_db"], marker, color=color, ms=7)
            label = row["name"].replace(" density=", " ").replace(" tail=", " ")
            # Away from the nearer edge.
            left = row[key] > middle
            axes.annotate(
                label,
                (row[key], row["psnr_db"]),
                (-5 if left else 5, 4),
                textcoords="offset points",
                fontsize=7,
                ha="right" if left else "left",
            )
        front = find_front([(better * row[key], row["psnr_db"]) for row in points])
        line = sorted((points[i][key], points[i]["psnr_db"]) for i in front)
        axes.plot(*zip(*line), "-", color="0.7", zorder=0, label="front")
        axes.margins(x=0.1)
        axes.set(xlabel=key, ylabel="PSNR against dense (dB)")
        axes.legend()
    title = f"{result['prompts']} prompts, {result['steps']} steps, {result['machine']['cpu']}"
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats in both coordinates, higher being better."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any((u >= x and v >= y) and (u > x or v > y) for u, v in points)
    ]


def _style(row: dict[str, Any], points: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """A colour for each router, a marker for each tail."""
    routers = sorted({str(p["options"].get("router", "auto")) for p in points})
    router = str(row["options"].get("router", "auto"))
    marker = "s" if row["options"].get("tail") == "centroid" else "o"
    return f"C{routers.index(router)}", marker
