"""Where in a denoising run a call stands, by its timestep alone.

Pipelines do not announce steps. Between calls the timestep falls (or rises, in models that count
the other way), stays equal for the next guidance branch, and jumps back for a new trajectory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dit_opt.program.modes import Mode, Schedule

# A first timestep below this noise level is not the start of a trajectory: a second transformer
# takes over at 0.9 or less, and the coarsest usual spacing (ten "leading" steps) starts at 0.901.
START_LEVEL = 0.9
# Timesteps that differ by less are one.
SAME = 1e-6
# By how much a model's timestep may be off the scheduler's: some are cast to whole numbers.
LISTED = 1e-3
# So many calls at the first timestep are branches of one step, if no earlier run had more; what
# comes after them is a new run. A model of one step has no other sign of it.
MAX_BRANCHES = 4


@dataclass(frozen=True)
class StepIndex:
    """Where one call stands.

    Attributes:
        run: a number of the denoising run that no other one of the process has.
        epoch: what state of an earlier call has to share with a call to serve it: the run, and how
            often in it the state before was given up because it may be that of another run.
        step: timesteps seen since the run began, or the scheduler's own index where it is known.
        branch: 0 for the first call of a step, 1 for the second (unconditional) one, and so on.
        level: noise level in [0, 1]; 1 is pure noise.
        from_start: the run was seen from pure noise on, so `step` counts from its beginning.
        total: number of steps of the run, where a scheduler told it.
    """

    run: int
    epoch: tuple[int, int]
    step: int
    branch: int
    level: float
    from_start: bool
    total: int | None = None


_runs = itertools.count(1)


def new_run() -> int:
    """A number that no run has yet."""
    return next(_runs)


class Clock:
    """Turns the timesteps of successive calls into indices of steps.

    One clock follows one stream of calls: one model, thread and shape. Requests that take turns on
    one thread, at one shape, are one stream: their timesteps do not tell them apart, so they may
    use each other's plans. Each needs a thread of its own.

    A call at the timestep of the last one is the next guidance branch. At the first timestep it may
    as well be a new run after a warm-up or an interrupted one. A scheduler tells them apart, since
    it makes a new list of timesteps for each run. Without one, where the first step had not the
    calls of a known step, its plans are given up, so that none serves a stranger.

    Args:
        run: number of the first run; a new one if None.
    """

    def __init__(self, run: int | None = None) -> None:
        self._next_run = run
        self._timesteps: Sequence[float] | None = None
        self.run = 0
        self._given_up = 0
        self._step = 0
        self._branch = 0
        self._index: int | None = None
        self._last: float | None = None
        self._first = 0.0
        self._scale = 1.0
        self._rising = False
        # calls in a step: the most in this run, after its first step; the same of the last run
        self._most = 0
        self._usual = 0
        # the first step had more calls than branches are known to be
        self._split = False

    def tick(
        self, timestep: float, timesteps: Sequence[float] | None = None, rounding: float = 0.0
    ) -> StepIndex:
        """The step of a call with `timestep`.

        Args:
            timesteps: the scheduler's, if known; another object for each run.
            rounding: by how much, relatively, the timestep's dtype may have moved it.
        """
        is_new = timesteps is not self._timesteps
        self._timesteps = timesteps
        step = (self.run, self._step)
        if self._last is None or is_new:
            self._begin(timestep)
        elif abs(timestep - self._last) <= SAME * self._scale:
            if self._step == 0 and self._branch + 1 >= max(MAX_BRANCHES, self._usual):
                self._begin(timestep)
                self._split = True
            else:
                self._branch += 1
        elif self._continues(timestep):
            self._end_step()
            self._step += 1
            self._branch = 0
            self._index = self._find_next(timestep, rounding)
        else:
            self._begin(timestep)
        if self._index is None and (self.run, self._step) != step:
            self._index = find_step(timestep, timesteps, max(LISTED, rounding))
        self._last = timestep
        level, first = (
            1 - t / self._scale if self._rising else t / self._scale
            for t in (timestep, self._first)
        )
        epoch = (self.run, self._given_up)
        if self._index is None or timesteps is None:
            from_start = first > START_LEVEL
            return StepIndex(self.run, epoch, self._step, self._branch, level, from_start)
        total = len(timesteps)
        return StepIndex(self.run, epoch, self._index, self._branch, level, True, total)

    def _continues(self, timestep: float) -> bool:
        """Whether a new timestep is the next step of the run (else a new run begins)."""
        assert self._last is not None
        if timestep > 1 and self._scale == 1.0:
            if self._first > 0:
                # a value of the other convention cannot belong to the same run
                return False
            self._scale = 1000.0
        rises = timestep > self._last
        if self._step == 0:
            if timestep == 0 or (rises and timestep > START_LEVEL * self._scale):
                # from wherever a warm-up was to pure noise, where a rising model counts from
                return False
            if rises != self._rising:
                # The first timestep told the direction wrong, or was of another clip.
                self._rising = rises
                self._given_up += 1
        return rises == self._rising

    def _end_step(self) -> None:
        calls = self._branch + 1
        if self._step > 0:
            self._most = max(self._most, calls)
        elif self._split or (self._index is None and calls != (self._usual or 1)):
            self._given_up += 1

    def _begin(self, timestep: float) -> None:
        self.run = new_run() if self._next_run is None else self._next_run
        self._next_run, self._given_up = None, 0
        self._usual, self._most = self._most or self._usual, 0
        self._step = self._branch = 0
        self._index, self._split = None, False
        self._first = timestep
        self._scale = 1000.0 if timestep > 1 else 1.0
        # nobody starts to denoise what is nearly clean: such a model counts upwards from noise
        self._rising = timestep <= 0.05 * self._scale

    def _find_next(self, timestep: float, rounding: float) -> int | None:
        """The scheduler's index of a step after a listed one; None where none was listed."""
        if self._index is None or self._timesteps is None:
            return None
        follower = min(self._index + 1, len(self._timesteps) - 1)
        # Rounded timesteps of neighbouring steps may be nearer to each other's entries.
        if find_step(timestep, self._timesteps[follower : follower + 1], rounding) == 0:
            return follower
        found = find_step(timestep, self._timesteps, max(LISTED, rounding))
        return follower if found is None else max(found, self._index)


def find_step(timestep: float, timesteps: Sequence[float] | None, tolerance: float) -> int | None:
    """The index of the nearest of a scheduler's timesteps, in its units or divided by 1000.

    None where the nearest is off by more than `tolerance` of itself.
    """
    best, least = None, tolerance
    for i, value in enumerate(timesteps or ()):
        for scaled in (value, value / 1000):
            off = abs(scaled - timestep) / (abs(scaled) or 1.0)
            if off <= least and (best is None or off < least):
                best, least = i, off
    return best


def is_dense(index: StepIndex | None, dense_steps: int | float) -> bool:
    """Whether a call belongs to the dense start of its run.

    `dense_steps` is a number of steps (int), or a share of the noise range (float): the steps whose
    noise level is above 1 minus the share. Whoever calls the model knows the level, but not always
    how many steps there will be. A run that was not seen from its start (a second transformer,
    image to image) has the steps of a number behind it. Without a step (no timestep) nothing is
    dense unless all is.
    """
    if index is None:
        return False
    if isinstance(dense_steps, int):
        return index.from_start and index.step < dense_steps
    return dense_steps > 0 and index.level > 1 - dense_steps


def choose_mode(
    index: StepIndex | None, schedule: Schedule, has_plan: bool, caught: bool = False
) -> Mode:
    """The graph variant for a call; `caught`: the guard found a head wrong in the last one."""
    if is_dense(index, schedule.dense_steps):
        return Mode.DENSE
    if not has_plan or caught or schedule.refresh_every == 1 or index is None:
        return Mode.SEARCH
    if index.step % schedule.refresh_every == 0:
        return Mode.SEARCH
    checks = schedule.verify_every and index.step % schedule.verify_every == 0
    return Mode.VERIFY if checks else Mode.REUSE
