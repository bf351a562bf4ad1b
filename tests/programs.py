"""Programs for tests: what the passes make of a graph, without any compiler."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from dit_opt import passes
from dit_opt.decisions import GraphRecord
from dit_opt.facts.graph import InputHints
from dit_opt.options import Options
from dit_opt.passes.base import Lowering, Pass, run
from dit_opt.program.dump import Dumper
from dit_opt.program.modes import Mode
from dit_opt.program.program import Program, Variant


def run_passes(
    gm: GraphModule,
    only: Sequence[Pass] | None = None,
    hints: InputHints | None = None,
    **options: object,
) -> tuple[GraphRecord, Lowering]:
    """Run passes, by default all, over a program of a graph; the graph stays as it is."""
    parsed = Options(**{"min_tokens": 0, **options})  # pyright: ignore[reportArgumentType]
    chosen = passes.PASSES if only is None else only
    lowering = run(chosen, Program(gm, hints), parsed, Dumper(None))
    return lowering.record, lowering


def lower(gm: GraphModule, mode: Mode = Mode.SEARCH, **options: object) -> Variant:
    """The graph of a mode, by all passes."""
    return run_passes(gm, **options)[1].make_variant(mode)  # pyright: ignore[reportArgumentType]


def count_calls(gm: GraphModule, target: object) -> int:
    """How many nodes call a function."""
    return len(gm.graph.find_nodes(op="call_function", target=target))


def list_slots(variant: Variant) -> tuple[list[str], list[str]]:
    """The names of the slots that a variant reads, and of those that it writes."""
    reads = [given.ref.slot.name for given in variant.graph.inputs if hasattr(given, "ref")]
    return reads, [write.ref.slot.name for write in variant.graph.writes]
