"""Programs: what passes write to, and what the runtime binds.

A program is one traced graph with the slots that it reads and writes, the modes that it is compiled
in, and pieces, which are graphs of their own that run only when what they make is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import GraphModule, Node

from dit_opt.facts.graph import Facts, InputHints
from dit_opt.program.edit import append_outputs, append_placeholder, copy_with_nodes
from dit_opt.program.modes import Mode, Schedule
from dit_opt.program.sizes import count_outputs
from dit_opt.program.slots import SlotRead, SlotRef, SlotWrite


@dataclass(frozen=True)
class ModeInput:
    """An appended placeholder: a bool on the CPU, whether a call has the mode.

    It lets one variant serve two modes. On the CPU, reading it waits for no device.
    """

    mode: Mode
    node: Node


Input: TypeAlias = "SlotRead | ModeInput"


class SlotGraph:
    """A graph module and the state in its signature.

    Attributes:
        gm: the graph module.
        inputs: what its appended placeholders are fed with, in their order.
        writes: where its appended outputs go, in their order.
        outputs: the number of outputs that are no state.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.inputs: list[Input] = []
        self.writes: list[SlotWrite] = []
        self.outputs = count_outputs(gm)

    def read(self, ref: SlotRef, example: torch.Tensor) -> Node:
        """A placeholder with the value of a slot, shaped as the fake tensor `example`."""
        for known in self.inputs:
            if isinstance(known, SlotRead) and known.ref == ref:
                return known.node
        node = append_placeholder(self.gm, f"slot_{_name(ref)}", example)
        self.inputs.append(SlotRead(ref, node))
        return node

    def read_mode(self, mode: Mode, like: torch.Tensor) -> Node:
        """A placeholder that tells whether a call has a mode; `like` gives the fake mode."""
        for known in self.inputs:
            if isinstance(known, ModeInput) and known.mode is mode:
                return known.node
        flag = like.new_empty((), dtype=torch.bool, device="cpu")
        node = append_placeholder(self.gm, f"mode_is_{mode.value}", flag)
        self.inputs.append(ModeInput(mode, node))
        return node

    def write(self, ref: SlotRef, node: Node, modes: Sequence[Mode] = ()) -> None:
        """Hand a node out as the value of a slot; in calls of `modes` only, where there are any."""
        append_outputs(self.gm, [node])
        self.writes.append(SlotWrite(ref, node, frozenset(modes)))

    def copy(self) -> tuple[SlotGraph, dict[Node, Node]]:
        """A copy with its own nodes, and the node of the copy for each of this graph."""
        gm, at = copy_with_nodes(self.gm)
        copied = SlotGraph(gm)
        copied.inputs = [dataclasses.replace(i, node=at[i.node]) for i in self.inputs]
        copied.writes = [dataclasses.replace(w, node=at[w.node]) for w in self.writes]
        copied.outputs = self.outputs
        return copied, at


@dataclass(frozen=True)
class Piece:
    """A graph of its own that makes values of slots.

    It runs before the main graph, in every call for which one of the slots that it writes has no
    valid value: because its key is new, or because its value is not valid any longer.

    Attributes:
        name: in dumps and logs.
        graph: it returns nothing but what it writes.
        arguments: which of the main graph's own arguments it takes, by position.
    """

    name: str
    graph: SlotGraph
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class LengthLimit:
    """A place that is worth its sparse modes only from `least` tokens on."""

    tokens: sympy.Expr
    least: int


@dataclass(frozen=True)
class PinnedTable:
    """What the ops of a place look up: made before a variant runs, and kept at its address.

    Attributes:
        place: see `SlotRef`; None for a table of the whole graph.
        sizes: what it is made from, evaluated in each call.
        make: makes it from the values of `sizes`, on a device.
    """

    place: int | None
    sizes: tuple[sympy.Expr, ...]
    make: Callable[[list[int], torch.device], Any]


@dataclass
class ModePlan:
    """The modes of a program and what the runtime must know to choose one.

    Attributes:
        modes: the modes that there are variants for.
        schedule: when each is due.
        served_by: modes that the variant of another one serves.
        alarm: a FLAG slot; where it was raised, the next call searches.
        limits: a call in which every place is under its limit is dense.
        pins: tables that variants look up.
    """

    modes: frozenset[Mode] = frozenset({Mode.DENSE})
    schedule: Schedule = field(default_factory=Schedule)
    served_by: dict[Mode, Mode] = field(default_factory=dict)
    alarm: SlotRef | None = None
    limits: list[LengthLimit] = field(default_factory=list)
    pins: list[PinnedTable] = field(default_factory=list)

    @property
    def first_mode(self) -> Mode:
        """The mode of the first call of a run."""
        sparse_first = Mode.SEARCH in self.modes and not self.schedule.dense_steps
        return Mode.SEARCH if sparse_first else Mode.DENSE


@dataclass
class Variant:
    """A copy of the main graph while it is lowered to a mode.

    Attributes:
        mode: what it is for. graph: the copy.
        at: the node of the copy for each node of the main graph.
        plan: the modes of the program.
    """

    mode: Mode
    graph: SlotGraph
    at: dict[Node, Node]
    plan: ModePlan


class Program:
    """One traced graph on its way through the passes.

    Attributes:
        main: what passes edit.
        dense: what dense steps run: `main` until a pass that serves sparse modes alone edits it,
            from then on the graph as it was before.
        facts: of `main`.
        pieces: run before it.
        plan: its modes.
    """

    def __init__(self, gm: GraphModule, hints: InputHints | None = None) -> None:
        self.main = SlotGraph(copy_with_nodes(gm)[0])
        self.dense = self.main
        # by node of the main graph, while they are two
        self._dense_nodes: dict[Node, Node] = {}
        self.facts = Facts(self.main.gm, hints)
        self.pieces: list[Piece] = []
        self.plan = ModePlan()

    def keep_dense(self) -> None:
        """Let later edits of `main` not reach dense steps."""
        if self.dense is self.main:
            self.dense, self._dense_nodes = self.main.copy()

    def start_variant(self, mode: Mode) -> Variant:
        """A copy to be lowered to a mode; that of DENSE has none of the sparse passes."""
        if mode is not Mode.DENSE or self.dense is self.main:
            return Variant(mode, *self.main.copy(), self.plan)
        graph, copies = self.dense.copy()
        at = {node: copies[dense] for node, dense in self._dense_nodes.items()}
        return Variant(mode, graph, at, self.plan)


def _name(ref: SlotRef) -> str:
    return f"{ref.slot.name.replace('.', '_')}_{ref.place}"
