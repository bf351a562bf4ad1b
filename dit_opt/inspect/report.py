"""What ditopt did with a model: decisions, phases, realised density per layer and head type."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_opt.decisions import Decision, GraphRecord
from dit_opt.inspect.render import render_report
from dit_opt.runtime.schedule import Phase


@dataclass(frozen=True)
class GuardReport:
    """What the guard found in one layer.

    Attributes:
        checks: how often it looked. kept, error: mass kept and relative L2 error of the plan on
            its rows, means over heads and checks. caught: heads that were caught, over all checks.
        dense_heads: heads that it keeps dense now.
    """

    checks: int
    kept: float
    error: float
    caught: int
    dense_heads: int


@dataclass(frozen=True)
class LayerReport:
    """One searching site of one layer, over all sparse calls of one guidance branch.

    Attributes:
        module: as "blocks.0.attn1". layer: name of the parameter that identifies the layer.
        branch: 0 conditional, 1 unconditional (in the order of calls).
        density: realised mean kept share, over heads and sparse calls, in real tokens; that of a
            head which the guard caught in a call is 1.
        recall: mean softmax mass inside the plans, as sampled at the searches; None where the
            router does not know it.
        heads: how many heads had each type at the last search, over the batch: their patterns
            under `rainfusion`, their orders of the tokens under `headwise`, else the router's name.
        density_by_type: mean density of the heads of each type at the last search.
        calls, searches: sparse calls, and those that searched.
        plan_bytes: memory of the plan that is kept between calls.
        guard: what the guard found; None where it does not run.
        differences: relative L2 difference of the output to dense attention by step, the mean over
            heads; empty without `verify`.
    """

    module: str
    layer: str
    branch: int
    density: float
    recall: float | None
    heads: dict[str, int]
    density_by_type: dict[str, float]
    calls: int
    searches: int
    plan_bytes: int
    guard: GuardReport | None
    differences: dict[int, float]


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: what was decided, how often each phase ran, what its layers did.

    Attributes:
        warm: Inductor's artifacts came from its cache; None where nothing was compiled yet.
        lacks_step: calls stayed dense because nothing told the step at which the dense start ends.
    """

    record: GraphRecord
    calls: dict[str, int]
    layers: tuple[LayerReport, ...]
    warm: bool | None
    lacks_step: bool = False


@dataclass(frozen=True)
class Report:
    """Everything about one model; `str()` gives the tables."""

    graphs: tuple[GraphReport, ...]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(d for g in self.graphs for d in g.record.decisions)

    @property
    def density(self) -> float | None:
        """Mean realised density over layers and sparse calls; None before the first one.

        Graphs that keep everything search nothing, and have no layers to tell it.
        """
        rows = [(row.density, row.calls) for g in self.graphs for row in g.layers]
        calls = sum(c for _, c in rows)
        if calls:
            return sum(d * c for d, c in rows) / calls
        kept_all = any(
            decision.router == "full" and g.calls.get(Phase.SEARCH.value)
            for g in self.graphs
            for decision in g.record.decisions
        )
        return 1.0 if kept_all else None

    def to_json(self) -> str:
        graphs = [
            {
                **g.record.to_json(),
                "calls": g.calls,
                "warm": g.warm,
                "lacks_step": g.lacks_step,
                "layers": [asdict(row) for row in g.layers],
            }
            for g in self.graphs
        ]
        return json.dumps({"density": self.density, "graphs": graphs}, indent=1)

    def __str__(self) -> str:
        return render_report(self.graphs, self.density)


def report(model: torch.nn.Module) -> Report:
    """What happened to a compiled model so far. Reads statistics from the device (one sync).

    Args:
        model: the module that was compiled, or what `torch.compile` returned.
    """
    from dit_opt.backend import live_bounds

    names = {id(p): name for name, p in model.named_parameters()}
    graphs = []
    for bound in live_bounds():
        owners = [owner for owner in bound.calls if id(owner) in names]
        if not owners:
            continue
        layers = [
            _describe(bound.record, names[id(owner)], key, state)
            for owner, key, state in bound.states
            if id(owner) in names
        ]
        graphs.append(
            GraphReport(
                record=bound.record,
                calls=_sum_calls([bound.calls[owner] for owner in owners]),
                layers=tuple(sorted(layers, key=lambda r: (_natural(r.layer), r.branch))),
                warm=bound.warm,
                lacks_step=bound.lacks_step,
            )
        )
    return Report(tuple(graphs))


def _sum_calls(calls: list[dict[Phase, int]]) -> dict[str, int]:
    total = {phase.value: sum(c[phase] for c in calls) for phase in Phase}
    return {phase: n for phase, n in total.items() if n}


def _natural(name: str) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def _describe(record: GraphRecord, name: str, key: Any, state: Any) -> LayerReport:
    from dit_opt.passes.sparse_attention import name_heads

    index, (_, _, branch) = key
    searching = [d for d in record.decisions if d.replaced and d.router != "full"]
    decision = searching[index]
    types = name_heads(decision.router, state.layout, state.plan)
    if types is None:
        types = [decision.router] * state.last_density.numel()
    densities = state.last_density.flatten().tolist()
    recall = float(state.recall.mean()) / state.searches
    by_type: dict[str, list[float]] = {}
    for kind, density in zip(types, densities):
        by_type.setdefault(kind, []).append(density)
    return LayerReport(
        module=decision.module,
        layer=name,
        branch=branch,
        density=float(state.density.mean()) / state.calls,
        recall=None if math.isnan(recall) else recall,
        heads=dict(Counter(types)),
        density_by_type={k: sum(v) / len(v) for k, v in by_type.items()},
        calls=state.calls,
        searches=state.searches,
        plan_bytes=state.plan_bytes,
        guard=_describe_guard(state),
        differences={step: float(d.mean()) for step, d in sorted(state.differences.items())},
    )


def _describe_guard(state: Any) -> GuardReport | None:
    guard = state.guard
    if guard is None:
        return None
    return GuardReport(
        checks=guard.checks,
        kept=float(guard.kept.mean()) / guard.checks,
        error=float(guard.error.mean()) / guard.checks,
        caught=int(guard.caught.sum()),
        dense_heads=int(state.boost.isinf().sum()),
    )
