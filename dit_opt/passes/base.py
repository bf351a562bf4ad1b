"""What a pass is, and the one place that runs passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from dit_opt.decisions import Decision, GraphRecord, PassRecord
from dit_opt.facts.graph import Facts
from dit_opt.options import Options, register_options
from dit_opt.program.dump import Dumper
from dit_opt.program.modes import Mode
from dit_opt.program.program import Program, Variant
from dit_opt.program.spec import SpecError, check_graph, list_unvalued


@dataclass(frozen=True)
class Match:
    """A place that a pass looked at.

    Attributes:
        decision: accepted, or why not.
        node: the node that the rewrite starts from; None where it is about a whole graph.
        what: what the rewrite has to know beside it.
    """

    decision: Decision
    node: Node | None = None
    what: Any = None


class Pass:
    """One rewrite of a program; a subclass is one file and one place in `PASSES`.

    Attributes:
        name: in options, dumps, records and logs.
        keeps: the facts that are still true after its rewrite, by name; see `facts.graph`.
        settings: a frozen dataclass with its options, which `options={name: ...}` then holds as
            an object, a dict or True; None where it has none of its own.
        sparse_only: it serves the sparse modes, and dense steps run without it. Such passes come
            behind all others.
    """

    name: ClassVar[str]
    keeps: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[type | None] = None
    sparse_only: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if cls.settings is not None:
            register_options(cls.name, cls.settings)

    def wanted(self, options: Options) -> bool:
        """Whether the options ask for it."""
        return self.settings is None or options.of_pass(self.name) is not None

    def find(self, facts: Facts, options: Options) -> list[Match]:
        """Every place that it looked at, in graph order, accepted or with a reason. Edits nothing.

        Raises OptionError where the options ask for what the graph does not allow.
        """
        raise NotImplementedError

    def declare(self, program: Program, matches: Sequence[Match], options: Options) -> None:
        """Say what the runtime must know: modes, limits, tables. Edits no graph."""

    def rewrite(self, program: Program, matches: Sequence[Match], options: Options) -> None:
        """Edit `program.main`, once for all modes; may add slots and pieces."""

    def lower(self, variant: Variant, matches: Sequence[Match], options: Options) -> None:
        """Edit the copy of the main graph for one mode. `variant.at` has the nodes of the copy."""

    def summarise(self, matches: Sequence[Match]) -> str:
        """One sentence for reports, or ""; `matches` are all that `find` returned."""
        return ""


@dataclass(frozen=True)
class Lowering:
    """What passes did, and how variants are made: each accepted pass lowers a copy of the graph."""

    program: Program
    record: GraphRecord
    options: Options
    accepted: tuple[tuple[Pass, tuple[Match, ...]], ...]
    dumper: Dumper
    unvalued: frozenset[str]

    def make_variant(self, mode: Mode) -> Variant:
        """The graph of a mode."""
        variant = self.program.start_variant(mode)
        for each, matches in self.accepted:
            if type(each).lower is Pass.lower or (each.sparse_only and mode is Mode.DENSE):
                continue
            with self.dumper.around(each.name, variant.graph.gm, mode.value):
                each.lower(variant, matches, self.options)
                variant.graph.gm.recompile()
            check_graph(variant.graph, each.name, self.unvalued)
        return variant


def run(passes: Sequence[Pass], program: Program, options: Options, dumper: Dumper) -> Lowering:
    """Run passes over a program; nothing is compiled, and variants are made later.

    This is the one place that times a pass, dumps the graph before and after it, checks what it
    left, and drops the facts that no longer hold.

    Raises OptionError where the options ask for what the graph does not allow, and SpecError where
    a pass left a graph that is not well formed.
    """
    unvalued = list_unvalued(program.main)
    timestep = program.facts.timestep
    dumper.graph("capture", program.main.gm)
    records: list[PassRecord] = []
    accepted: list[tuple[Pass, tuple[Match, ...]]] = []
    for each in passes:
        if not each.wanted(options):
            continue
        began = time.perf_counter()
        found = each.find(program.facts, options)
        matches = tuple(match for match in found if match.decision.accepted)
        if matches:
            each.declare(program, matches, options)
            _rewrite(each, program, matches, options, dumper)
            check_graph(program.main, each.name, unvalued)
            accepted.append((each, matches))
        records.append(
            PassRecord(
                name=each.name,
                changed=len(matches),
                seconds=time.perf_counter() - began,
                decisions=tuple(match.decision for match in found),
                summary=each.summarise(found),
            )
        )
    record = GraphRecord(
        passes=tuple(records),
        timestep=None if timestep is None else timestep.candidates[0].name,
    )
    return Lowering(program, record, options, tuple(accepted), dumper, unvalued)


def _rewrite(
    each: Pass, program: Program, matches: Sequence[Match], options: Options, dumper: Dumper
) -> None:
    if type(each).rewrite is Pass.rewrite:
        return
    if each.sparse_only:
        program.keep_dense()
    elif program.dense is not program.main:
        raise SpecError(
            f"Pass {each.name!r} rewrites all modes, but stands behind one of sparse modes alone, "
            "so dense steps would run without it; put it before that one in PASSES."
        )
    with dumper.around(each.name, program.main.gm):
        each.rewrite(program, matches, options)
        program.main.gm.recompile()
    program.facts.drop(each.keeps)
