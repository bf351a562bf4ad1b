"""Where in a denoising run a call stands, told by its timestep alone.

Pipelines do not announce steps. Between calls the timestep falls (or rises, in models that count
the other way), stays equal for the next guidance branch, and jumps back for a new trajectory.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# A first timestep below this noise level is not the start of a trajectory: a second transformer
# takes over at 0.9 or less, and the coarsest usual spacing (ten "leading" steps) starts at 0.901.
START_LEVEL = 0.9
# Levels that differ by less are one step: fp16 and bf16 timesteps are rounded.
SAME = 1e-6


class Phase(enum.Enum):
    """Which variant of a graph runs."""

    # dense attention, the baseline's own kernel
    OBSERVE = "observe"
    # sparse attention, plans searched in this call
    SEARCH = "search"
    # sparse attention with the plans of an earlier call
    REUSE = "reuse"
    # the same, and the guard checks the plans first
    VERIFY = "verify"


@dataclass(frozen=True)
class Position:
    """Where one call stands.

    Attributes:
        run: a number of the denoising run that no other one of the process has.
        step: timesteps seen since the run began, or the scheduler's own index where it is known.
        branch: 0 for the first call of a step, 1 for the second (unconditional) one, and so on.
        level: noise level in [0, 1]; 1 is pure noise.
        from_start: the run was seen from pure noise on, so `step` counts from its beginning.
        total: number of steps of the run, where a scheduler told it.
    """

    run: int
    step: int
    branch: int
    level: float
    from_start: bool
    total: int | None = None


_runs = itertools.count(1)


class Clock:
    """Turns the timesteps of successive calls into positions.

    One clock follows one stream of calls: one model, thread and shape. One that takes over from
    another goes on with its `run`.
    """

    def __init__(self, run: int | None = None) -> None:
        self._next_run = run
        self.run = 0
        self._step = 0
        self._branch = 0
        self._last: float | None = None
        self._first = 0.0
        self._scale = 1.0
        self._rising = False

    def tick(self, timestep: float, timesteps: Sequence[float] | None = None) -> Position:
        """The position of a call with `timestep`; `timesteps` are the scheduler's, if known."""
        if self._last is not None and abs(timestep - self._last) <= SAME * self._scale:
            self._branch += 1
        elif self._last is not None and self._continues(timestep):
            self._step += 1
            self._branch = 0
        else:
            self._begin(timestep)
        self._last = timestep
        level = timestep / self._scale
        level = 1 - level if self._rising else level
        first = 1 - self._first / self._scale if self._rising else self._first / self._scale
        step, total, from_start = self._step, None, first > START_LEVEL
        index = _find(timestep, timesteps)
        if index is not None:
            step, total, from_start = index, len(timesteps), True
        return Position(self.run, step, self._branch, level, from_start, total)

    def _continues(self, timestep: float) -> bool:
        """Whether a new timestep is the next step of the run (else a new run begins)."""
        assert self._last is not None
        if timestep > 1 and self._scale == 1.0:
            if self._first > 0:
                # a value of the other convention cannot belong to the same run
                return False
            self._scale = 1000.0
        return timestep > self._last if self._rising else timestep < self._last

    def _begin(self, timestep: float) -> None:
        self.run = next(_runs) if self._next_run is None else self._next_run
        self._next_run = None
        self._step = self._branch = 0
        self._first = timestep
        self._scale = 1000.0 if timestep > 1 else 1.0
        # nobody starts to denoise what is nearly clean: such a model counts upwards from noise
        self._rising = timestep <= 0.05 * self._scale


def _find(timestep: float, timesteps: Sequence[float] | None) -> int | None:
    """The index of a timestep in the scheduler's list, in its units or divided by 1000."""
    for i, value in enumerate(timesteps or ()):
        if abs(value - timestep) <= 1e-3 * abs(value) or abs(value / 1000 - timestep) <= 1e-6:
            return i
    return None


def is_dense(position: Position | None, dense_steps: int | float) -> bool:
    """Whether a call belongs to the dense start of its trajectory.

    `dense_steps` is a number of steps (int) or a share of the trajectory (float). A share of a run
    whose length is unknown is a share of the noise range: with shifted schedules that is more
    steps, never fewer. A run that was not seen from its start (a second transformer, image to
    image) has its start behind it. Without any position (no timestep) nothing is dense unless
    all is.
    """
    if position is None:
        return False
    if isinstance(dense_steps, int):
        return position.from_start and position.step < dense_steps
    if position.total is not None:
        return position.step < round(dense_steps * position.total)
    return dense_steps > 0 and position.level > 1 - dense_steps


@dataclass(frozen=True)
class Schedule:
    """When to be dense, to search and to check; see `Options`. `verify_every` 0 checks nothing."""

    dense_steps: int | float = 0
    refresh_every: int = 1
    verify_every: int = 0


def choose_phase(
    position: Position | None, schedule: Schedule, has_plan: bool, caught: bool = False
) -> Phase:
    """The graph variant for a call; `caught`: the guard found a head wrong in the last one."""
    if is_dense(position, schedule.dense_steps):
        return Phase.OBSERVE
    if not has_plan or caught or schedule.refresh_every == 1 or position is None:
        return Phase.SEARCH
    if position.step % schedule.refresh_every == 0:
        return Phase.SEARCH
    checks = schedule.verify_every and position.step % schedule.verify_every == 0
    return Phase.VERIFY if checks else Phase.REUSE
