"""What is remembered between calls: plans and statistics per layer, and what `optimize` told.

Keys are live `nn.Parameter` objects. One compiled block serves all layers under regional
compilation, so anything made at compile time would be shared by them; parameter identity also
survives offloading, which swaps `.data`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dit_opt.runtime.schedule import Position

# A head that was caught so often in a trajectory stays dense to its end.
CATCHES_TO_DENSE = 3

# Streams of calls (threads, sizes, branches) whose state is kept, of each layer.
KEPT_STREAMS = 64

_lock = threading.Lock()


def remember(entries: dict[Any, Any], key: Hashable, value: Any) -> None:
    """Put an entry last, and forget those that were put longest ago."""
    with _lock:
        entries.pop(key, None)
        entries[key] = value
        while len(entries) > KEPT_STREAMS:
            del entries[next(iter(entries))]


@dataclass
class GuardState:
    """Sums over the guard's checks of one site, fp32 `[B, H]`: mass kept, error, catches."""

    kept: torch.Tensor
    error: torch.Tensor
    caught: torch.Tensor
    checks: int = 1


@dataclass
class LayerState:
    """Plan and running statistics of one site of one layer, on the device.

    Attributes:
        run: `Position.plans` of the call that searched the plan; it is no plan for another one.
        layout: (T, H, W, start, N) of the site, which gives the choices their meaning.
        plan: what the last search found: each head's choice, int32 `[B, H]`, or its lists, packed
            (`kernels.plan.packing`), and its order; none where it follows from shapes.
        density: fp32 `[B, H]`, summed over sparse calls, as executed: 1 for a head that was caught.
        recall: fp32 `[B, H]`, summed over searches.
        last_density: fp32 `[B, H]` of the plan in use.
        calls: sparse calls. searches: those of them that searched.
        boost: fp32 `[B, H]`, how much less each head may drop than the options allow.
        kept: fp32 `[B, H]`, the mass that the plan kept on the guard's rows when it was made.
        guard: what the guard found, or None where it does not run.
        differences: relative L2 difference to dense attention, fp32 `[B, H]`, by step.
    """

    run: tuple[int, int]
    layout: tuple[int, ...]
    plan: tuple[torch.Tensor, ...]
    last_density: torch.Tensor
    density: torch.Tensor
    recall: torch.Tensor
    calls: int = 1
    searches: int = 1
    kept: torch.Tensor | None = None
    boost: torch.Tensor | None = None
    guard: GuardState | None = None
    differences: dict[int, torch.Tensor] = field(default_factory=dict)

    def begin(self, run: tuple[int, int]) -> None:
        """What the guard learned in another run holds no longer."""
        if run != self.run and self.boost is not None:
            # in place, because a CUDA graph knows its inputs by their addresses
            self.boost.fill_(1.0)

    def record_search(
        self,
        run: tuple[int, int],
        plan: tuple[torch.Tensor, ...],
        recall: torch.Tensor,
        density: torch.Tensor,
    ) -> None:
        """Take over the plan of a search, of the same shapes as the one before."""
        self.run = run
        for part, new in zip(self.plan, plan):
            part.copy_(new)
        self.last_density.copy_(density)
        self.density += density
        self.recall += recall
        self.calls += 1
        self.searches += 1

    def record_reuse(self) -> None:
        self.density += self.last_density
        self.calls += 1

    def record_check(
        self, kept: torch.Tensor, error: torch.Tensor, caught: torch.Tensor, searched: bool
    ) -> None:
        """Keep what the guard found: a head that was caught may drop half of what it might before,
        and none at all after `CATCHES_TO_DENSE` times in a run.

        Comes after the record of the call's plan, whose density it corrects: what was caught ran
        dense.
        """
        if self.kept is None or self.boost is None:
            self.kept, self.boost = kept.clone(), torch.ones_like(kept)
        elif searched:
            self.kept.copy_(kept)
        dense = self.boost >= 2.0 ** (CATCHES_TO_DENSE - 1)
        raised = torch.where(dense, torch.inf, 2 * self.boost)
        self.boost.copy_(torch.where(caught > 0, raised, self.boost))
        # not in place: a plan of shapes alone has one density for all items
        self.density = self.density + caught * (1 - self.last_density)
        if self.guard is None:
            self.guard = GuardState(kept.clone(), error.clone(), caught.clone())
            return
        self.guard.kept += kept
        self.guard.error += error
        self.guard.caught += caught
        self.guard.checks += 1

    @property
    def plan_bytes(self) -> int:
        """Memory that the plan takes."""
        return sum(part.numel() * part.element_size() for part in self.plan)


class LayerStates:
    """The states of all layers that one compiled graph serves.

    By the parameter that identifies a layer, then by site and stream; of each site the
    `KEPT_STREAMS` that were used last.
    """

    def __init__(self) -> None:
        self._by_parameter: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, owner: torch.Tensor, site: int, key: Hashable) -> LayerState | None:
        """The state of a stream, which is now the last one used."""
        states = self._by_parameter.get(owner, {}).get(site, {})
        state = states.get(key)
        if state is not None:
            remember(states, key, state)
        return state

    def add_search(
        self,
        owner: torch.Tensor,
        site: int,
        key: Hashable,
        layout: tuple[int, ...],
        run: tuple[int, int],
        plan: tuple[torch.Tensor, ...],
        recall: torch.Tensor,
        density: torch.Tensor,
    ) -> LayerState:
        """Keep what a search returned. Copies: a CUDA graph reuses its output memory."""
        state = self.get(owner, site, key)
        if state is not None and [p.shape for p in state.plan] == [p.shape for p in plan]:
            state.record_search(run, plan, recall, density)
            return state
        kept = tuple(part.clone() for part in plan)
        state = LayerState(run, layout, kept, density.clone(), density.clone(), recall.clone())
        remember(self._by_parameter.setdefault(owner, {}).setdefault(site, {}), key, state)
        return state

    def __iter__(self) -> Iterator[tuple[torch.Tensor, tuple[int, Any], LayerState]]:
        for owner, sites in list(self._by_parameter.items()):
            for site, states in list(sites.items()):
                for key, state in list(states.items()):
                    yield owner, (site, key), state


class Announcement:
    """What `optimize` knows of a model that its graphs cannot know.

    `timesteps` reads the scheduler's list. `position` is set, per thread, by a hook around the
    model where its blocks are compiled one by one and see no timestep themselves; `streams` are
    the calls that the hook follows, each with its clocks.
    """

    def __init__(self, timesteps: Callable[[], torch.Tensor | Sequence[float] | None]) -> None:
        self._read = timesteps
        self._local = threading.local()
        self.streams: dict[Hashable, Any] = {}

    @property
    def position(self) -> Position | None:
        return getattr(self._local, "position", None)

    @position.setter
    def position(self, value: Position | None) -> None:
        self._local.position = value

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
    """Tell the graphs that this thread compiles next what the whole model knows of its tokens."""
    _running.grid = grid


def running_grid() -> tuple[int, int, int] | None:
    """(T, H, W) of the model that this thread runs, where its blocks are compiled one by one."""
    return getattr(_running, "grid", None)


def set_running_announcement(announcement: Announcement | None) -> None:
    """Tell the graphs that this thread runs next which model they belong to."""
    _running.announcement = announcement


_announcements: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Parameters may all be replaced, as by `load_state_dict(assign=True)`.
_known: weakref.WeakSet[Announcement] = weakref.WeakSet()


def announce(model: torch.nn.Module, announcement: Announcement) -> None:
    """Make an announcement known to every graph that holds a parameter of the model."""
    _known.add(announcement)
    for parameter in model.parameters():
        _announcements[parameter] = announcement


def forget_clocks() -> None:
    """Have every announced model begin a new trajectory."""
    for announcement in list(_known):
        announcement.streams.clear()


def announcement_for(parameter: torch.Tensor | None) -> Announcement | None:
    """What was announced of the model with a parameter.

    A parameter that was put in place of another is not known; it belongs to the model that runs.
    """
    if parameter is None:
        return None
    return _announcements.get(parameter) or getattr(_running, "announcement", None)
