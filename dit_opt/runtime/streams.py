"""Streams: the calls of one model, each placed in its denoising run by its timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dit_opt.runtime.clock import Clock, StepIndex, new_run


class Stream:
    """One sequence of calls (one model, thread and shape): a clock for each timestep candidate."""

    def __init__(self, candidates: tuple[int, ...]) -> None:
        run = new_run()
        self._clocks = {i: Clock(run) for i in candidates}
        self._chosen = candidates[0]
        self._values: dict[int, float] = {}

    def locate(self, args: Mapping[int, Any], timesteps: list[float] | None) -> StepIndex:
        """Read the candidates, and tell the timestep from a guidance scale: it is in the
        scheduler's list, or else what changed last, the other one being constant."""
        read = read_timesteps({i: args[i] for i in self._clocks})
        indices = {i: self._clocks[i].tick(t, timesteps, off) for i, (t, off) in read.items()}
        if len(read) > 1:
            self._choose({i: value for i, (value, _) in read.items()}, indices)
        return indices[self._chosen]

    def _choose(self, values: dict[int, float], indices: dict[int, StepIndex]) -> None:
        listed = [i for i, index in indices.items() if index.total is not None]
        likely = listed or list(values)
        changed = [i for i in likely if i in self._values and self._values[i] != values[i]]
        for group in (likely, changed):
            if group and self._chosen not in group:
                self._chosen = group[0]
        self._values = values


def read_timesteps(given: Mapping[int, Any]) -> dict[int, tuple[float, float]]:
    """Of each timestep its value, and how much its dtype may have moved it, relatively.

    Per-token timesteps mark conditioning tokens as clean; the largest tells the step. One host
    read for each device.
    """
    values = {i: float(t) for i, t in given.items() if not isinstance(t, torch.Tensor)}
    tensors = {i: t for i, t in given.items() if isinstance(t, torch.Tensor)}
    for device in {t.device for t in tensors.values()}:
        here = [i for i, t in tensors.items() if t.device == device]
        largest = torch.stack([tensors[i].max().float() for i in here]).tolist()
        values.update(zip(here, largest, strict=True))
    return {i: (values[i], _rounding(t)) for i, t in given.items()}


def _rounding(timestep: Any) -> float:
    # Divided by 1000 or not, it may have been rounded twice.
    is_float = isinstance(timestep, torch.Tensor) and timestep.is_floating_point()
    return torch.finfo(timestep.dtype).eps if is_float else 0.0
