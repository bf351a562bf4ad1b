"""Stand-ins for compiled variants, and programs bound to them; nothing is traced."""

from __future__ import annotations

import sympy
import torch
from torch.fx import Graph

from dit_opt.program.modes import Mode, Schedule
from dit_opt.program.program import LengthLimit, ModePlan
from dit_opt.program.signature import Signature
from dit_opt.program.slots import Lives, Reduce, Slot, SlotRead, SlotRef, SlotWrite
from dit_opt.runtime.bound import Bound
from dit_opt.runtime.compiler import Compiled

PLAN = SlotRef(Slot("test.plan", blank=0), anchor=0)
DENSITY = SlotRef(Slot("test.density", lives=Lives.PROCESS, reduce=Reduce.SUM), anchor=0)
RECALL = SlotRef(Slot("test.recall", lives=Lives.PROCESS, reduce=Reduce.SUM), anchor=0)
HEADS = 3


def make_node(dtype=torch.int32):
    """A node as graphs append it for a slot."""
    node = Graph().placeholder("state")
    node.meta["example_value"] = torch.empty(1, HEADS, dtype=dtype)
    return node


def read(ref, dtype=torch.int32):
    """What `Compiled.inputs` has of a slot that is read."""
    return SlotRead(ref, make_node(dtype)), lambda args: [1, HEADS]


def write(*refs, modes=()):
    """What `Compiled.writes` has of slots that are written."""
    return tuple(SlotWrite(ref, make_node(), frozenset(modes)) for ref in refs)


class Variants:
    """Stands in for compiled graphs of weight, timestep and latents: a search plans its number."""

    def __init__(self) -> None:
        self.runs: list[tuple[Mode, tuple]] = []
        self.compiled: list[Mode] = []

    def compile(self, mode: Mode) -> Compiled:
        self.compiled.append(mode)

        def run(weight, *rest):
            # plans change in place, at the address that a CUDA graph knows
            kept = tuple(r.clone() if isinstance(r, torch.Tensor) else r for r in rest)
            self.runs.append((mode, kept))
            if mode is Mode.SEARCH:
                count = sum(m is Mode.SEARCH for m, _ in self.runs)
                plan = torch.full((1, HEADS), count, dtype=torch.int32)
                return weight + 1, plan, plan / 10, plan / 100
            return (weight + 1, rest[-1] / 100) if mode is Mode.REUSE else (weight + 1,)

        if mode is Mode.SEARCH:
            return Compiled(run, 1, (), write(PLAN, RECALL, DENSITY))
        if mode is Mode.REUSE:
            return Compiled(run, 1, (read(PLAN),), write(DENSITY))
        return Compiled(run, 1, (), ())

    @property
    def modes(self) -> list[str]:
        return [mode.value for mode, _ in self.runs]

    @property
    def plans(self) -> list[int]:
        """The plan of each call that reused one."""
        return [rest[-1].tolist()[0][0] for mode, rest in self.runs if mode is Mode.REUSE]


def bind(
    variants,
    timesteps=(1,),
    dense_steps=1,
    refresh_every=2,
    verify_every=0,
    lengths=((8, 4),),
    pieces=(),
    graph=None,
    model=0,
    **plan,
):
    """A program with every mode; `lengths` are (tokens of a call, least that is worth it)."""
    plan = ModePlan(
        modes=plan.pop("modes", frozenset(Mode)),
        schedule=Schedule(dense_steps, refresh_every, verify_every),
        limits=[LengthLimit(sympy.sympify(n), least) for n, least in lengths],
        **plan,
    )
    signature = Signature(1, timesteps, model, user_inputs=(1, 2))
    return Bound(variants.compile, signature, plan, graph or Graph(), None, pieces)


def weight():
    return torch.nn.Parameter(torch.zeros(2), requires_grad=False)


def run(bound, w, timesteps, latents=None):
    latents = torch.zeros(1) if latents is None else latents
    return [bound(w, torch.tensor([float(t)]), latents) for t in timesteps]


def list_entries(bound, ref):
    """The entries of a slot, those that were used last at the end."""
    return [entry for _, (slot, _), _, entry in bound.store if slot == ref.slot]
