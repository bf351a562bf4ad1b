"""Times rival functions fairly: in turns, so that all of them see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Milliseconds:
    """Times of one function: the median, the best and the worst call, and how many there were."""

    median: float
    min: float
    max: float
    calls: int


def time_in_turns(
    rivals: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    warm_up: int = 2,
    min_rounds: int = 3,
) -> dict[str, Milliseconds]:
    """Call the rivals in turn for about `seconds`, at least `min_rounds` times each.

    The first `warm_up` rounds are not counted. Each call on a GPU ends with a synchronisation.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(warm_up):
        for call in rivals.values():
            _time_once(call, device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < min_rounds:
        for name, call in rivals.items():
            times[name].append(_time_once(call, device))
    return summarise_times(times)


def summarise_times(times: Mapping[str, list[float]]) -> dict[str, Milliseconds]:
    """By name, from all its times in milliseconds; rounded to 10 ns."""
    return {
        name: Milliseconds(
            *(round(value, 5) for value in (statistics.median(spent), min(spent), max(spent))),
            len(spent),
        )
        for name, spent in times.items()
    }


def _time_once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
