"""What ditopt did with a model: decisions, modes, realised density per layer and head type."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_opt.decisions import SiteDecision
from dit_opt.inspect.records import GraphReport, GuardReport, LayerReport
from dit_opt.inspect.text import render_report
from dit_opt.passes.sparse_attention import (
    DENSITY,
    DIFFERENCE,
    PLAN_DENSITY,
    RECALL,
)
from dit_opt.program.modes import Mode
from dit_opt.program.slots import Slot
from dit_opt.routers import KEEP_ALL, find_router
from dit_opt.routers.base import BOOST
from dit_opt.routers.guard import CAUGHT, CHECKED_ERROR, CHECKED_MASS
from dit_opt.runtime.bound import Bound
from dit_opt.runtime.registry import live_bounds
from dit_opt.runtime.slot_store import Entry


@dataclass(frozen=True)
class Report:
    """Everything about one model; `str()` gives the tables."""

    graphs: tuple[GraphReport, ...]

    @property
    def decisions(self) -> tuple[SiteDecision, ...]:
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
            decision.router == KEEP_ALL.name and g.calls.get(Mode.SEARCH.value)
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
                "slot_bytes": g.slot_bytes,
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
    names = {id(p): name for name, p in model.named_parameters()}
    graphs = []
    for bound in live_bounds():
        owners = [owner for owner in bound.calls if id(owner) in names]
        if not owners:
            continue
        layers = _describe_layers(bound, names)
        graphs.append(
            GraphReport(
                record=bound.record,
                calls=_sum_calls([bound.calls[owner] for owner in owners]),
                layers=tuple(sorted(layers, key=lambda r: (_natural(r.layer), r.branch))),
                warm=bound.warm,
                lacks_step=bound.lacks_step,
                slot_bytes=bound.store.count_bytes(names),
            )
        )
    return Report(tuple(graphs))


def _sum_calls(calls: list[dict[Mode, int]]) -> dict[str, int]:
    total = {mode.value: sum(c[mode] for c in calls) for mode in Mode}
    return {mode: n for mode, n in total.items() if n}


def _natural(name: str) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def _describe_layers(bound: Bound, names: dict[int, str]) -> list[LayerReport]:
    """One report for each site, layer and branch that ran sparse."""
    found: dict[Any, dict[Slot, Entry]] = {}
    steps: dict[Any, dict[int, Entry]] = {}
    for owner, (slot, place), (stream, branch, step), entry in bound.store:
        if id(owner) not in names or branch is None:
            continue
        where = (names[id(owner)], place, stream, branch)
        if slot is DIFFERENCE:
            steps.setdefault(where, {})[step] = entry
        else:
            found.setdefault(where, {})[slot] = entry
    return [
        _describe_layer(bound, where, entries, steps.get(where, {}))
        for where, entries in found.items()
        if DENSITY in entries
    ]


def _describe_layer(
    bound: Bound, where: tuple[Any, ...], entries: dict[Slot, Entry], steps: dict[int, Entry]
) -> LayerReport:
    name, place, (_, sizes), branch = where
    decision = next(d for d in bound.record.decisions if d.site == place)
    density, recall, last = (entries[slot] for slot in (DENSITY, RECALL, PLAN_DENSITY))
    router = find_router(decision.router)
    state = {slot.name: entries[slot].value for slot in router.slots if slot in entries}
    layout = bound.pin_sizes[sizes][_find_pin(bound, place)]
    types = router.name_heads(layout, state) or [decision.router] * last.value.numel()
    by_type: dict[str, list[float]] = {}
    for kind, share in zip(types, last.value.flatten().tolist()):
        by_type.setdefault(kind, []).append(share)
    mean_recall = float(recall.value.mean()) / recall.writes
    return LayerReport(
        module=decision.module,
        layer=name,
        branch=branch,
        density=float(density.value.mean()) / density.writes,
        recall=None if math.isnan(mean_recall) else mean_recall,
        heads=dict(Counter(types)),
        density_by_type={k: sum(v) / len(v) for k, v in by_type.items()},
        calls=density.writes,
        searches=recall.writes,
        plan_bytes=sum(value.nbytes for value in state.values()),
        guard=_describe_guard(entries),
        differences={step: float(e.value.mean()) for step, e in sorted(steps.items())},
    )


def _find_pin(bound: Bound, place: int) -> int:
    return next(i for i, pin in enumerate(bound.plan.pins) if pin.place == place)


def _describe_guard(entries: dict[Slot, Entry]) -> GuardReport | None:
    if CHECKED_MASS not in entries:
        return None
    mass, error, caught, boost = (
        entries[slot] for slot in (CHECKED_MASS, CHECKED_ERROR, CAUGHT, BOOST)
    )
    return GuardReport(
        checks=mass.writes,
        kept=float(mass.value.mean()) / mass.writes,
        error=float(error.value.mean()) / error.writes,
        caught=int(caught.value.sum()),
        dense_heads=int(boost.value.isinf().sum()),
    )
