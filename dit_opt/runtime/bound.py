"""The callable that Dynamo runs: one graph, its phase variants and the state between calls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dit_opt.runtime.schedule import Clock, Phase, Position, choose_phase
from dit_opt.runtime.state import Announcement, LayerStates, announcement_for

log = logging.getLogger(__name__)

# recall and density, which follow the tensors of a plan
STATISTICS = 2


class GradientError(RuntimeError):
    """A graph made for inference was called where gradients are recorded."""


def refuse_gradients(args: tuple[Any, ...]) -> None:
    """Raise GradientError where a call would have to be differentiated."""
    if torch.is_grad_enabled() and any(
        isinstance(a, torch.Tensor) and a.requires_grad for a in args
    ):
        raise GradientError(
            "ditopt compiles for inference only, and an input or a weight requires grad. Call the "
            "model under torch.no_grad() or torch.inference_mode(), or freeze it with "
            "model.requires_grad_(False)."
        )


@dataclass(frozen=True)
class Wiring:
    """What the arguments and outputs of a graph mean.

    Attributes:
        outputs: number of outputs that belong to the graph itself.
        timesteps: positions of the arguments that may be the timestep.
        model: position of a parameter that identifies the model, if it has one.
        layers: for each searching site, position of a parameter that identifies its layer.
        plan_tensors: how many outputs of each searching site are its plan; recall and density
            follow them, and the graph's own outputs stand before.
        layouts: (T, H, W, start, N) of each searching site, from the arguments of a call.
        lengths: tokens of each replaced site, from the arguments of a call.
        min_tokens: a call in which every site is shorter stays dense.
    """

    outputs: int
    timesteps: tuple[int, ...]
    model: int | None
    layers: tuple[int | None, ...]
    plan_tensors: int
    layouts: Callable[[tuple[Any, ...]], list[tuple[int, ...]]]
    lengths: Callable[[tuple[Any, ...]], list[int]]
    min_tokens: int


class Stream:
    """One sequence of calls (one model, thread and shape): its clock and its timestep input."""

    def __init__(self, candidates: tuple[int, ...]) -> None:
        self._clock = Clock()
        self._candidates = candidates
        self._values: dict[int, float] = {}

    def locate(self, args: tuple[Any, ...], timesteps: list[float] | None) -> Position:
        """Read the timestep (one host read once it is told from a constant guidance scale)."""
        values = {i: _read(args[i]) for i in self._candidates}
        if len(values) > 1 and self._values:
            changed = [i for i in values if values[i] != self._values[i]]
            if changed and len(changed) < len(values):
                if changed[0] != self._candidates[0]:
                    self._clock = Clock()
                    self._clock.tick(self._values[changed[0]], timesteps)
                self._candidates = tuple(changed)
        self._values = values
        return self._clock.tick(values[self._candidates[0]], timesteps)


def _read(timestep: Any) -> float:
    # per-token timesteps mark conditioning tokens as clean; the others tell the step
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


class Bound:
    """A compiled graph bound to its schedule and its state.

    Args:
        compile_variant: compiles the graph for a phase and tells whether Inductor's cache had it;
            called once per phase, on first use.
        phases: variants that exist. Without a sparse one the graph stays as it is.
        wiring: see Wiring.
        dense_steps, refresh_every: the schedule, see `runtime.schedule`.
        record: what the backend decided, for reports; not read here.
    """

    def __init__(
        self,
        compile_variant: Callable[[Phase], tuple[Callable[..., Any], bool]],
        phases: frozenset[Phase],
        wiring: Wiring,
        dense_steps: int | float,
        refresh_every: int,
        record: Any,
    ) -> None:
        self.record = record
        self.warm: bool | None = None
        self.states = LayerStates()
        # how often each phase ran, by the parameter that identifies a model: one graph may serve
        # several models of one class
        self.calls: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._compile_variant = compile_variant
        self.phases = phases
        self._wiring = wiring
        self.dense_steps = dense_steps
        self._refresh_every = refresh_every if Phase.REUSE in phases else 1
        self._variants: dict[Phase, Callable[..., Any]] = {}
        self._streams: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.Lock()
        self._warned = False
        # stands in for the model where a graph has no parameters
        self._nobody = torch.empty(0)

    def forget(self) -> None:
        """Drop plans, statistics and trajectories; compiled graphs stay."""
        self.states = LayerStates()
        self.calls = WeakIdKeyDictionary()
        self._streams = WeakIdKeyDictionary()

    def variant(self, phase: Phase) -> Callable[..., Any]:
        """The compiled graph of a phase."""
        with self._lock:
            if phase not in self._variants:
                log.debug("compiling the %s variant", phase.value)
                self._variants[phase], warm = self._compile_variant(phase)
                # the whole is as warm as its coldest variant
                self.warm = warm and self.warm is not False
            return self._variants[phase]

    def __call__(self, *args: Any) -> Any:
        refuse_gradients(args)
        owner = self._nobody if self._wiring.model is None else args[self._wiring.model]
        if owner not in self.calls:
            self.calls[owner] = dict.fromkeys(Phase, 0)
        calls = self.calls[owner]
        if self.phases == {Phase.OBSERVE}:
            calls[Phase.OBSERVE] += 1
            return self.variant(Phase.OBSERVE)(*args)
        # a thread, and the sizes of a dynamic graph, have trajectories of their own
        stream = (threading.get_ident(), tuple(a for a in args if isinstance(a, int)))
        position = self._locate(owner, stream, args)
        key = (*stream, position.branch if position else 0)
        phase = self._phase(args, key, position)
        calls[phase] += 1
        if phase is not Phase.SEARCH:
            plans = self._plans(args, key) if phase is Phase.REUSE else ()
            return self.variant(phase)(*args, *plans)
        out = self.variant(phase)(*args)
        self._keep(args, key, out[self._wiring.outputs :])
        return out[: self._wiring.outputs]

    def _locate(
        self, owner: torch.Tensor, stream: Hashable, args: tuple[Any, ...]
    ) -> Position | None:
        announcement: Announcement | None = announcement_for(owner)
        if not self._wiring.timesteps:
            return announcement.position if announcement else None
        streams = self._streams.setdefault(owner, {})
        if stream not in streams:
            streams[stream] = Stream(self._wiring.timesteps)
        return streams[stream].locate(args, announcement.timesteps() if announcement else None)

    def _phase(self, args: tuple[Any, ...], key: Hashable, position: Position | None) -> Phase:
        if max(self._wiring.lengths(args)) < self._wiring.min_tokens:
            return Phase.OBSERVE
        if position is None and self.dense_steps:
            # nothing tells the step: the promise of a dense start is kept by staying dense
            self._warn_without_step()
            return Phase.OBSERVE
        has_plans = all(
            i is not None and self.states.get(args[i], (site, key)) is not None
            for site, i in enumerate(self._wiring.layers)
        )
        return choose_phase(position, self.dense_steps, self._refresh_every, has_plans)

    def _warn_without_step(self) -> None:
        if not self._warned:
            log.warning(
                "No input of this graph tells the denoising step, so its attention stays dense. "
                "Compile through ditopt.optimize(pipe), which knows the scheduler, or set "
                "options={'dense_steps': 0} to be sparse from the first step on."
            )
        self._warned = True

    def _plans(self, args: tuple[Any, ...], key: Hashable) -> list[torch.Tensor]:
        plans = []
        for site, i in enumerate(self._wiring.layers):
            state = self.states.get(args[i], (site, key)) if i is not None else None
            assert state is not None
            # the state follows a model that was moved between calls
            plans += [part.to(args[i].device) for part in state.plan]
            self.states.record_reuse(args[i], (site, key))
        return plans

    def _keep(self, args: tuple[Any, ...], key: Hashable, extra: tuple[Any, ...]) -> None:
        layouts = self._wiring.layouts(args)
        for site, (i, layout) in enumerate(zip(self._wiring.layers, layouts)):
            owner = self._nobody if i is None else args[i]
            count = self._wiring.plan_tensors + STATISTICS
            *plan, recall, density = extra[site * count : (site + 1) * count]
            self.states.record_search(owner, (site, key), layout, tuple(plan), recall, density)
