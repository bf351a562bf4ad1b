"""The search part of the GPU benchmark: what each router costs beside a dense call."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.gpu_attention import bind_ours, drop_failing, list_dense, measure_dense
from benchmarks.gpu_cases import Case, make_inputs, make_plan
from benchmarks.gpu_timing import time_captured
from benchmarks.searches import list_searches, make_mover
from dit_opt.options import DEFAULT_REFRESH_EVERY

# (T, H, W) of the searched sequences; the first is the one that the bars name.
GRIDS = ((16, 32, 64), (21, 45, 80))
DENSITY = 0.5


def measure_grid(
    grid: tuple[int, int, int],
    device: torch.device,
    seconds: float,
    heads: int = 24,
    dim: int = 128,
) -> dict[str, Any]:
    """Milliseconds of every search over a grid, and shares of the fastest dense call.

    The speedup with search is that of all that `headwise` pays in a step on average: the sparse
    call at a density of a half, its token moves, and its search, spread over a plan's steps.
    """
    case = Case(dim, grid[0] * grid[1] * grid[2], heads, DENSITY)
    q, k, v = make_inputs(case, torch.bfloat16, device)
    baseline = measure_dense(dim, case.tokens, heads, device, seconds)["times"]
    fastest = min(baseline, key=lambda name: baseline[name]["median"])
    searches = list_searches(q, k, grid, DENSITY)
    rivals = {
        "dense": list_dense(q, k, v)[fastest],
        "sparse": bind_ours(case, q, k, v, *make_plan(case, device)),
        **searches,
        "moves": make_mover(q, k, v, grid, searches["headwise"]()[2]),
    }
    rivals, failed = drop_failing(rivals)
    times = time_captured(rivals, seconds, device)
    dense = times["dense"].median
    spent = (
        times["sparse"].median
        + times["moves"].median
        + times["headwise"].median / DEFAULT_REFRESH_EVERY
    )
    return {
        "fastest_dense": fastest,
        "failed": failed,
        "milliseconds": {name: dataclasses.asdict(t) for name, t in times.items()},
        "share_of_dense": {n: t.median / dense for n, t in times.items() if n != "dense"},
        "speedup_with_search": dense / spent,
    }
