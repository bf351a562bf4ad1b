"""The callable that Dynamo runs: one graph, its phase variants and the state between calls."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dit_opt.runtime.handover import Moment, Spans, tell, told_moment
from dit_opt.runtime.schedule import Phase, Position, Schedule, choose_phase
from dit_opt.runtime.state import (
    Announcement,
    LayerState,
    LayerStates,
    announcement_for,
    remember,
)
from dit_opt.runtime.streams import Stream

log = logging.getLogger(__name__)

# What a variant that is told by an input whether to search is told.
_SEARCHES = {told: torch.tensor(told, device="cpu") for told in (False, True)}

# What is said of a graph with a dense start that cannot know where it ends.
WITHOUT_STEP = (
    "Nothing tells this graph the denoising step, so it cannot know when its dense start (option "
    "dense_steps, on by default) is over, and stays dense in every call: ditopt makes it no "
    "faster. Compile it through dit_opt.optimize(model, regional=True), which reads the step from "
    "an argument of the model that is called `timestep`, or set dense_steps=0 to be sparse from "
    "the first step on, and compare the results with dense ones."
)

# Of plans that were made without any position.
NO_RUN = (0, 0)


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
        state: what each searching site adds to the outputs, by phase: "plan" (once for each of its
            tensors), "recall", "density", "kept", "error", "caught", "difference". The graph's own
            outputs stand before.
        heads: batch and heads of each searching site, from the arguments of a call.
        layouts: (T, H, W, start, N) of each searching site, from the arguments of a call.
        hold: makes the tables that the sites of a call look up on a device.
        lengths: tokens of each replaced site, from the arguments of a call.
        min_tokens: of each replaced site; a call in which every site is shorter stays dense.
        blank_plan: makes, from batch, heads and tokens, what stands for the plan of a site in a
            call that searches, where one variant searches and reuses, as an input tells it; None
            where each phase has its own.
        given: positions of the arguments that are not the model's own.
        spans: how the tokens lie in the graph's outputs, by their position.
    """

    outputs: int
    timesteps: tuple[int, ...]
    model: int | None
    layers: tuple[int | None, ...]
    state: Mapping[Phase, tuple[str, ...]]
    heads: Callable[[tuple[Any, ...]], list[tuple[int, ...]]]
    layouts: Callable[[tuple[Any, ...]], list[tuple[int, ...]]]
    hold: Callable[[tuple[Any, ...], torch.device], Any]
    lengths: Callable[[tuple[Any, ...]], list[int]]
    min_tokens: tuple[int, ...]
    blank_plan: Callable[[int, int, int], tuple[torch.Tensor, ...]] | None = None
    given: tuple[int, ...] = ()
    spans: Mapping[int, Spans] = field(default_factory=dict)


class Bound:
    """A compiled graph bound to its schedule and its state.

    Args:
        compile_variant: compiles the graph for a phase and tells whether Inductor's cache had it;
            called once per phase, on first use.
        phases: variants that exist. Without a sparse one the graph stays as it is.
        wiring: see Wiring.
        schedule: when to run which phase.
        record: what the backend decided, for reports; not read here.
    """

    def __init__(
        self,
        compile_variant: Callable[[Phase], tuple[Callable[..., Any], bool]],
        phases: frozenset[Phase],
        wiring: Wiring,
        schedule: Schedule,
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
        reuses = Phase.REUSE in phases
        self.schedule = schedule if reuses else dataclasses.replace(schedule, refresh_every=1)
        # of each stream: whether the guard caught a head in its last call, on the device
        self._caught: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._variants: dict[Phase, Callable[..., Any]] = {}
        self._streams: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._held: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()
        # whether a call stayed dense because nothing told its step
        self.lacks_step = False
        # stands in for the model where a graph has no parameters
        self._nobody = torch.empty(0)

    def forget(self) -> None:
        """Drop plans, statistics and trajectories; compiled graphs stay."""
        self.states = LayerStates()
        self.calls = WeakIdKeyDictionary()
        self._streams = WeakIdKeyDictionary()
        self._caught = WeakIdKeyDictionary()

    def variant(self, phase: Phase) -> Callable[..., Any]:
        """The compiled graph of a phase."""
        if phase is Phase.REUSE and self._wiring.blank_plan is not None:
            phase = Phase.SEARCH
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
        # a thread, and the sizes of a dynamic graph, have trajectories of their own
        steps = self._wiring.timesteps
        sizes = (a for i, a in enumerate(args) if isinstance(a, int) and i not in steps)
        stream = (threading.get_ident(), tuple(sizes))
        moment = self._find_moment(owner, stream, args)
        outputs = self._run(owner, stream, args, moment)
        tell(outputs, self._wiring.spans, moment)
        return outputs

    def _run(
        self,
        owner: torch.Tensor,
        stream: tuple[int, tuple[int, ...]],
        args: tuple[Any, ...],
        moment: Moment | None,
    ) -> Any:
        """The graph's own outputs, by the variant of this moment."""
        calls = self.calls[owner]
        if self.phases == {Phase.OBSERVE}:
            calls[Phase.OBSERVE] += 1
            return self.variant(Phase.OBSERVE)(*args)
        position = moment and moment.position
        key = (*stream, position.branch if position else 0)
        states = [
            self.states.get(self._nobody if i is None else args[i], site, key)
            for site, i in enumerate(self._wiring.layers)
        ]
        phase = self._phase(owner, args, key, position, states)
        calls[phase] += 1
        if phase is Phase.OBSERVE:
            return self.variant(phase)(*args)
        device = _find_device(args)
        if device.type != "cpu" and stream[1] not in self._held:
            # A CUDA graph knows tables by their addresses, for as long as it is replayed.
            self._held[stream[1]] = self._wiring.hold(args, device)
        out = self.variant(phase)(*args, *self._state_inputs(phase, args, position, states))
        self._keep(owner, phase, args, key, position, states, out[self._wiring.outputs :])
        return out[: self._wiring.outputs]

    def _find_moment(
        self, owner: torch.Tensor, stream: Hashable, args: tuple[Any, ...]
    ) -> Moment | None:
        """When this call is: by its own timestep, by what was announced, or by an argument that an
        earlier graph of the same call returned."""
        announcement: Announcement | None = announcement_for(owner)
        if not self._wiring.timesteps:
            position = announcement.position if announcement else None
            if position is not None:
                return Moment(lambda: position)
            return told_moment(args[i] for i in self._wiring.given)
        steps = {i: args[i] for i in self._wiring.timesteps}

        def locate() -> Position:
            streams = self._streams.setdefault(owner, {})
            current = streams.get(stream) or Stream(self._wiring.timesteps)
            remember(streams, stream, current)
            return current.locate(steps, announcement.timesteps() if announcement else None)

        return Moment(locate)

    def _phase(
        self,
        owner: torch.Tensor,
        args: tuple[Any, ...],
        key: Hashable,
        position: Position | None,
        states: Sequence[LayerState | None],
    ) -> Phase:
        lengths = zip(self._wiring.lengths(args), self._wiring.min_tokens, strict=True)
        if all(length < least for length, least in lengths):
            return Phase.OBSERVE
        if position is None and self.schedule.dense_steps:
            # nothing tells the step: the promise of a dense start is kept by staying dense
            if not self.lacks_step:
                log.warning(WITHOUT_STEP)
            self.lacks_step = True
            return Phase.OBSERVE
        run = position.plans if position else NO_RUN
        has_plans = None not in self._wiring.layers and all(
            s is not None and s.run == run for s in states
        )
        flag = self._caught.get(owner, {}).pop(key, None)
        # read beside the timestep, when the call that made it is over
        caught = flag is not None and bool(flag)
        return choose_phase(position, self.schedule, has_plans, caught)

    def _state_inputs(
        self,
        phase: Phase,
        args: tuple[Any, ...],
        position: Position | None,
        states: Sequence[LayerState | None],
    ) -> list[torch.Tensor]:
        """What a variant takes beside the graph's own arguments, site after site."""
        inputs: list[torch.Tensor] = []
        device = _find_device(args)
        heads = self._wiring.heads(args)
        layouts = self._wiring.layouts(args)
        make_blank = self._wiring.blank_plan
        for site, state in enumerate(states):
            if state is not None:
                state.begin(position.plans if position else NO_RUN)
            if make_blank is not None:
                inputs.append(_SEARCHES[phase is Phase.SEARCH])
            if phase is not Phase.SEARCH:
                assert state is not None
                # the state follows a model that was moved between calls
                inputs += [part.to(device) for part in state.plan]
                if phase is Phase.VERIFY:
                    assert state.kept is not None
                    inputs.append(state.kept.to(device))
            elif make_blank is not None:
                inputs += make_blank(*heads[site], layouts[site][-1])
            elif "caught" in self._wiring.state[phase]:
                boost = None if state is None else state.boost
                if boost is None or boost.shape != heads[site]:
                    boost = torch.ones(heads[site])
                inputs.append(boost.to(device))
        return inputs

    def _keep(
        self,
        model: torch.Tensor,
        phase: Phase,
        args: tuple[Any, ...],
        key: Hashable,
        position: Position | None,
        states: Sequence[LayerState | None],
        extra: tuple[Any, ...],
    ) -> None:
        """Record what the sites of a variant returned."""
        names, caught = self._wiring.state[phase], []
        step, run = (position.step, position.plans) if position else (0, NO_RUN)
        for site, (i, layout, state) in enumerate(
            zip(self._wiring.layers, self._wiring.layouts(args), states, strict=True)
        ):
            owner = self._nobody if i is None else args[i]
            values = extra[site * len(names) : (site + 1) * len(names)]
            found = dict(zip(names, values, strict=True))
            if phase is Phase.SEARCH:
                plan = tuple(v for n, v in zip(names, values) if n == "plan")
                search = (run, plan, found["recall"], found["density"])
                state = self.states.add_search(owner, site, key, layout, *search)
            else:
                assert state is not None
                state.record_reuse()
            if "caught" in found:
                check = (found["kept"], found["error"], found["caught"])
                state.record_check(*check, searched=phase is Phase.SEARCH)
                caught.append(found["caught"].any())
            if "difference" in found:
                state.differences[step] = found["difference"].clone()
        if caught:
            remember(self._caught.setdefault(model, {}), key, torch.stack(caught).any())


def _find_device(args: tuple[Any, ...]) -> torch.device:
    """Where a graph runs; some of its arguments may stay on the processor, as a timestep does."""
    devices = [a.device for a in args if isinstance(a, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
