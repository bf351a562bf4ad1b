"""The search part of the GPU benchmark: what each router costs beside a dense call."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from benchmarks.crossover import list_rivals
from benchmarks.gpu_attention import drop_failing, list_dense, measure_dense
from benchmarks.gpu_cases import Case, make_inputs
from benchmarks.gpu_timing import time_captured
from benchmarks.searches import list_searches
from dit_opt.options import DEFAULT_REFRESH_EVERY
from dit_opt.routers.base import BLOCK_K, BLOCK_Q

# (T, H, W) of the searched sequences; the first is the one that the bars name.
GRIDS = ((16, 32, 64), (21, 45, 80))
DENSITY = 0.5


def search_exactly(q: Tensor, k: Tensor, density: float) -> Any:
    """A search by all rows, of tokens that are all video."""
    goal = (None, q.shape[-1] ** -0.5, density, True)
    return torch.ops.ditopt.adaspa_plan_v2(q, k, *goal, 0, q.shape[2], BLOCK_Q, BLOCK_K, 1)


def measure_grid(
    grid: tuple[int, int, int],
    device: torch.device,
    seconds: float,
    heads: int = 24,
    dim: int = 128,
) -> dict[str, Any]:
    """Milliseconds of every search over a grid, and shares of the fastest dense call, once and
    spread over a plan's steps.

    The speedup with search is that of all that `headwise` pays in a step on average: its lists
    unpacked, the sparse call by them at a density of a half, its token moves, and its search,
    spread over a plan's steps.
    """
    case = Case(dim, grid[0] * grid[1] * grid[2], heads, DENSITY)
    q, k, v = make_inputs(case, torch.bfloat16, device)
    baseline = measure_dense(dim, case.tokens, heads, device, seconds)["times"]
    fastest = min(baseline, key=lambda name: baseline[name]["median"])
    searches, failed = drop_failing(list_searches(q, k, grid, DENSITY))
    step = list_rivals(q, k, v, grid, DENSITY)
    realised = float(searches["headwise"]()[4].mean())
    rivals = {
        "dense": list_dense(q, k, v)[fastest],
        "sparse": step["sparse"],
        "moves": step["moves"],
        **searches,
    }
    if device.type == "cuda":
        # on a processor they take as long as everything else
        found, refused = drop_failing({"exact": lambda: search_exactly(q, k, DENSITY)})
        rivals, failed = rivals | found, failed | refused
    times = time_captured(rivals, seconds, device)
    dense = times["dense"].median
    shares = {n: t.median / dense for n, t in times.items() if n != "dense"}
    spent = shares["sparse"] + shares["moves"] + shares["headwise"] / DEFAULT_REFRESH_EVERY
    return {
        "fastest_dense": fastest,
        "failed": failed,
        "realised_density": realised,
        "milliseconds": {name: dataclasses.asdict(t) for name, t in times.items()},
        "share_of_dense": shares,
        "share_of_dense_per_step": {
            name: share / DEFAULT_REFRESH_EVERY
            for name, share in shares.items()
            if name not in ("sparse", "moves")
        },
        "speedup_with_search": 1 / spent,
    }
