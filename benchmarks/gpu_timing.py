"""Times calls on a GPU without what the host spends on launching them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from benchmarks.timing import Milliseconds, summarise_times, time_in_turns

log = logging.getLogger(__name__)

# One sample replays a call for at least so long.
_SAMPLE_MS = 2.0


def time_captured(
    rivals: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, Milliseconds]:
    """Each rival's call from a CUDA graph of its own, in turns, by device events.

    A call that cannot be captured is timed from the host and named in the log. On a processor, as
    `time_in_turns`.
    """
    if device.type != "cuda":
        return time_in_turns(rivals, seconds, device)
    replays = {name: _capture(name, call) for name, call in rivals.items()}
    repeats = {name: _choose_repeats(call) for name, call in replays.items()}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    spent = 0.0
    while spent < seconds * 1e3 or min(map(len, times.values())) < 3:
        for name, call in replays.items():
            once = _time_events(call, repeats[name])
            times[name].append(once)
            spent += once * repeats[name]
    return summarise_times(times)


def _capture(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """A replay of the call; the call itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        log.warning("%s is timed without a CUDA graph: %s", name, error)
        return call
    return graph.replay


def _choose_repeats(call: Callable[[], object]) -> int:
    _time_events(call, 1)
    return max(1, round(_SAMPLE_MS / max(1e-3, _time_events(call, 1))))


def _time_events(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one of several calls in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats
