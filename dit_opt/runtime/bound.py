"""The callable that Dynamo runs: one program, its compiled variants and the state between calls."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph
from torch.utils.weak import WeakIdKeyDictionary

from dit_opt.program.modes import Mode
from dit_opt.program.program import ModeInput, ModePlan
from dit_opt.program.signature import Signature
from dit_opt.program.sizes import read_sizes
from dit_opt.program.slots import Lives, SlotRef
from dit_opt.runtime.clock import StepIndex, choose_mode
from dit_opt.runtime.compiler import Compiled, CompiledPiece, ShapeReader
from dit_opt.runtime.handover import CallTime, read_call_time, tag_outputs
from dit_opt.runtime.scheduler_link import SchedulerLink, find_link
from dit_opt.runtime.slot_store import CallKey, SlotStore, remember
from dit_opt.runtime.streams import Stream

log = logging.getLogger(__name__)

# What is said of a graph with a dense start that cannot know where it ends.
WITHOUT_STEP = (
    "Nothing tells this graph the denoising step, so it cannot know when its dense start (option "
    "dense_steps, on by default) is over, and stays dense in every call: ditopt makes it no "
    "faster. Compile it through dit_opt.optimize(model, regional=True), which reads the step from "
    "an argument of the model that is called `timestep`, or set dense_steps=0 to be sparse from "
    "the first step on, and compare the results with dense ones."
)

# of calls whose step nothing tells
NO_EPOCH = (0, 0)
_FLAGS = {value: torch.tensor(value, device="cpu") for value in (False, True)}


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
class Call:
    """One call of a program.

    Attributes:
        args: the main graph's own arguments.
        model: the parameter that identifies the model, or what stands for it.
        key: what tells it from other calls. device: where it runs.
    """

    args: tuple[Any, ...]
    model: torch.Tensor
    key: CallKey
    device: torch.device

    def owner_of(self, ref: SlotRef) -> torch.Tensor:
        """The parameter that a slot's value belongs to."""
        return self.model if ref.anchor is None else self.args[ref.anchor]


class Bound:
    """A program bound to its schedule and its state.

    Args:
        compile_variant: compiles the graph of a mode; called once per mode, on first use.
        signature: what arguments and outputs mean.
        plan: the modes and when each is due. graph: that its sizes are expressions of.
        record: what was decided about the graph, for reports; not read here.
        pieces: run before the graph of any mode.
    """

    def __init__(
        self,
        compile_variant: Callable[[Mode], Compiled],
        signature: Signature,
        plan: ModePlan,
        graph: Graph,
        record: Any,
        pieces: Sequence[CompiledPiece] = (),
    ) -> None:
        self.record = record
        self.plan = plan
        self.warm: bool | None = None
        self.store = SlotStore()
        # how often each mode ran, by the parameter that identifies a model: one graph may serve
        # several models of one class
        self.calls: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # by the sizes of a call: those that each pinned table is made from
        self.pin_sizes: dict[tuple[int, ...], list[list[int]]] = {}
        self._compile_variant = compile_variant
        self._signature = signature
        self._pieces = pieces
        self._variants: dict[Mode, Compiled] = {}
        self._streams: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._pinned: dict[tuple[int, ...], list[Any]] = {}
        self._read_lengths = read_sizes([limit.tokens for limit in plan.limits], graph)
        self._read_pins = [read_sizes(pin.sizes, graph) for pin in plan.pins]
        self._lock = threading.Lock()
        # whether a call stayed dense because nothing told its step
        self.lacks_step = False
        # stands in for the model where a graph has no parameters
        self._nobody = torch.empty(0)

    def forget(self) -> None:
        """Drop the values of all slots, statistics and runs; compiled graphs stay."""
        self.store = SlotStore()
        self.calls = WeakIdKeyDictionary()
        self._streams = WeakIdKeyDictionary()

    def variant(self, mode: Mode) -> Compiled:
        """The compiled graph of a mode."""
        mode = self.plan.served_by.get(mode, mode)
        with self._lock:
            if mode not in self._variants:
                log.debug("compiling the %s variant", mode.value)
                self._variants[mode] = self._compile_variant(mode)
                # the whole is as warm as its coldest variant
                self.warm = self._variants[mode].is_warm and self.warm is not False
            return self._variants[mode]

    def __call__(self, *args: Any) -> Any:
        refuse_gradients(args)
        model = self._signature.model
        owner = self._nobody if model is None else args[model]
        if owner not in self.calls:
            self.calls[owner] = dict.fromkeys(Mode, 0)
        # a thread, and the sizes of a dynamic graph, have runs of their own
        steps = self._signature.timesteps
        sizes = tuple(a for i, a in enumerate(args) if isinstance(a, int) and i not in steps)
        stream = (threading.get_ident(), sizes)
        time = self._find_call_time(owner, stream, args)
        needs_step = self.plan.modes != {Mode.DENSE} or self._pieces
        index = time.step_index if time is not None and needs_step else None
        key = CallKey(stream, sizes, 0, 0, NO_EPOCH)
        if index is not None:
            key = CallKey(stream, sizes, index.branch, index.step, index.epoch)
        outputs = self._run(Call(args, owner, key, find_device(args)), index)
        tag_outputs(outputs, self._signature.spans, time)
        return outputs

    def _run(self, call: Call, index: StepIndex | None) -> Any:
        """The graph's own outputs, by the variant that is due."""
        mode = self._choose(call, index)
        self.calls[call.model][mode] += 1
        if mode is not Mode.DENSE:
            self._pin(call)
        for piece in self._pieces:
            self._run_piece(piece, call)
        compiled = self.variant(mode)
        outputs = compiled.run(*call.args, *self._feed(compiled, mode, call, call.args))
        if not compiled.writes:
            return outputs
        self._keep(compiled, mode, call, outputs[compiled.outputs :])
        return outputs[: compiled.outputs]

    def _find_call_time(
        self, owner: torch.Tensor, stream: Hashable, args: tuple[Any, ...]
    ) -> CallTime | None:
        """When this call is: by its own timestep, by the hook around the model, or by an argument
        that an earlier graph of the same call returned."""
        link: SchedulerLink | None = find_link(owner)
        if not self._signature.timesteps:
            index = link.step_index if link else None
            if index is not None:
                return CallTime(lambda: index)
            return read_call_time(args[i] for i in self._signature.user_inputs)
        steps = {i: args[i] for i in self._signature.timesteps}

        def locate() -> StepIndex:
            streams: Any = self._streams.setdefault(owner, {})
            current = streams.get(stream) or Stream(self._signature.timesteps)
            remember(streams, stream, current)
            return current.locate(steps, link.timesteps() if link else None)

        return CallTime(locate)

    def _choose(self, call: Call, index: StepIndex | None) -> Mode:
        plan = self.plan
        if plan.modes == {Mode.DENSE}:
            return Mode.DENSE
        lengths = zip(self._read_lengths(call.args), plan.limits, strict=True)
        if all(length < limit.least for length, limit in lengths):
            return Mode.DENSE
        if index is None and plan.schedule.dense_steps:
            # nothing tells the step: the promise of a dense start is kept by staying dense
            if not self.lacks_step:
                log.warning(WITHOUT_STEP)
            self.lacks_step = True
            return Mode.DENSE
        # read beside the timestep, when the call that raised it is over
        alarmed = plan.alarm is not None and self.store.take_flag(call.model, plan.alarm, call.key)
        return choose_mode(index, plan.schedule, self._has_plans(call), alarmed)

    def _has_plans(self, call: Call) -> bool:
        """Whether a search of this run has written all that lives as long as the run."""
        search = self._variants.get(Mode.SEARCH)
        if search is None or Mode.REUSE not in self.plan.modes:
            return False
        refs = (write.ref for write in search.writes if write.ref.slot.lives is Lives.RUN)
        return all(self.store.find(call.owner_of(ref), ref, call.key) for ref in refs)

    def _pin(self, call: Call) -> None:
        """Make the tables of the sizes of a call, where a CUDA graph may know their addresses."""
        sizes = call.key.sizes
        if sizes not in self.pin_sizes:
            self.pin_sizes[sizes] = [read(call.args) for read in self._read_pins]
        if call.device.type != "cpu" and sizes not in self._pinned:
            found = zip(self.plan.pins, self.pin_sizes[sizes], strict=True)
            self._pinned[sizes] = [pin.make(values, call.device) for pin, values in found]

    def _run_piece(self, piece: CompiledPiece, call: Call) -> None:
        compiled = piece.compiled
        refs = [write.ref for write in compiled.writes]
        if all(self.store.find(call.owner_of(ref), ref, call.key) for ref in refs):
            return
        own = tuple(call.args[i] for i in piece.arguments)
        outputs = compiled.run(*own, *self._feed(compiled, Mode.DENSE, call, own))
        self._keep(compiled, Mode.DENSE, call, outputs[compiled.outputs :])

    def _feed(
        self, compiled: Compiled, mode: Mode, call: Call, own: tuple[Any, ...]
    ) -> list[torch.Tensor]:
        """What a graph takes behind its own arguments."""
        fed: list[torch.Tensor] = []
        for given, read_shape in compiled.inputs:
            if isinstance(given, ModeInput):
                fed.append(_FLAGS[mode is given.mode])
                continue
            make = functools.partial(_make_blank, read_shape, own, given.example.dtype, call.device)
            owner = call.owner_of(given.ref)
            fed.append(self.store.read(owner, given.ref, call.key, call.device, make))
        return fed

    def _keep(
        self, compiled: Compiled, mode: Mode, call: Call, values: Sequence[torch.Tensor]
    ) -> None:
        """Record what a graph returned behind its own outputs."""
        for write, value in zip(compiled.writes, values, strict=True):
            if not write.modes or mode in write.modes:
                self.store.write(call.owner_of(write.ref), write.ref, call.key, value)


def _make_blank(
    read_shape: ShapeReader,
    own: tuple[Any, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    # may be written to in every mode of autograd
    with torch.inference_mode(False):
        return torch.empty(read_shape(own), dtype=dtype, device=device)


def find_device(args: Sequence[Any]) -> torch.device:
    """Where a graph runs; some of its arguments may stay on the CPU, as a timestep does."""
    devices = [a.device for a in args if isinstance(a, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
