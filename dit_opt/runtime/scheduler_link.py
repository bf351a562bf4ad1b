"""What `optimize` knows of a model that its graphs cannot know: the scheduler, step and grid.

Keys are live `nn.Parameter` objects, whose identity survives offloading, which swaps `.data`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dit_opt.runtime.clock import StepIndex


class SchedulerLink:
    """The scheduler of one model, and where its run stands.

    `timesteps` reads the scheduler's list. `step_index` is set, per thread, by a hook around the
    model where its blocks are compiled one by one and see no timestep themselves; `streams` are
    the calls that the hook follows, each with its clocks.
    """

    def __init__(self, timesteps: Callable[[], torch.Tensor | Sequence[float] | None]) -> None:
        self._read = timesteps
        self._local = threading.local()
        self.streams: dict[Hashable, Any] = {}

    @property
    def step_index(self) -> StepIndex | None:
        return getattr(self._local, "step_index", None)

    @step_index.setter
    def step_index(self, value: StepIndex | None) -> None:
        self._local.step_index = value

    def timesteps(self) -> list[float] | None:
        """The scheduler's timesteps; one host read for each new list."""
        current = self._read()
        if current is None:
            return None
        seen, values = getattr(self._local, "timesteps", (None, []))
        if seen is not current:
            values = [float(t) for t in current]
            self._local.timesteps = (current, values)
        return values


_running = threading.local()


def set_running_grid(grid: tuple[int, int, int] | None) -> None:
    """Set what the whole model that this thread runs knows of the tokens of its blocks."""
    _running.grid = grid


def running_grid() -> tuple[int, int, int] | None:
    """(T, H, W) of the model that this thread runs, where its blocks are compiled one by one."""
    return getattr(_running, "grid", None)


def set_running_link(link: SchedulerLink | None) -> None:
    """Set the link of the model that this thread runs."""
    _running.link = link


_links: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Parameters may all be replaced, as by `load_state_dict(assign=True)`.
_known: weakref.WeakSet[SchedulerLink] = weakref.WeakSet()


def link_scheduler(model: torch.nn.Module, link: SchedulerLink) -> None:
    """Make a link known to every graph that holds a parameter of the model."""
    _known.add(link)
    for parameter in model.parameters():
        _links[parameter] = link


def forget_clocks() -> None:
    """Have every linked model begin a new run."""
    for link in list(_known):
        link.streams.clear()


def find_link(parameter: torch.Tensor | None) -> SchedulerLink | None:
    """The link of the model with a parameter.

    A parameter that was put in place of another is not known; it belongs to the model that runs.
    """
    if parameter is None:
        return None
    return _links.get(parameter) or getattr(_running, "link", None)
