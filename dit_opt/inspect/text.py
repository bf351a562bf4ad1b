"""Decisions and reports as text: the only place that makes tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
from tabulate import tabulate

from dit_opt.decisions import AttentionReason, GraphRecord, LayoutSummary, SiteDecision, Size
from dit_opt.inspect.differences import suggest_dense
from dit_opt.inspect.records import GraphReport, GuardReport, LayerReport
from dit_opt.program.modes import Mode
from dit_opt.runtime.bound import WITHOUT_STEP

# Of a graph with replaced sites in which none has been sparse.
ALL_DENSE = (
    "Every call so far stayed dense: it was in the dense start of its run (dense_steps), or had "
    "fewer tokens than pay (min_tokens)."
)


def render_decisions(decisions: Sequence[SiteDecision], title: str = "") -> str:
    """A table with one row for each site (layers that differ by number share one), then reasons.

    Args:
        decisions: in graph order.
        title: a line above the table, or "".
    """
    if not decisions:
        return f"{title}\nNo attention site.".strip()
    groups = _group_layers(decisions)
    rows = [_make_row(name, members) for name, members in groups]
    table = tabulate(rows, headers="keys", disable_numparse=True)
    notes = "\n".join(_explain_reasons([members[0] for _, members in groups]))
    return "\n".join(part for part in (title, table, notes) if part)


def render_records(records: Sequence[GraphRecord]) -> str:
    """The decisions of each graph of a model; graphs without attention in one line."""
    if not any(record.decisions for record in records):
        return f"No attention site in {_count(len(records), 'graph')}."
    parts = []
    for number, record in enumerate(records):
        if record.decisions:
            parts.append(render_decisions(record.decisions, _title(number, len(records), record)))
    without = sum(not record.decisions for record in records)
    if without:
        parts.append(f"{_count(without, 'more graph')} without attention.")
    return "\n\n".join(parts)


def render_report(graphs: Sequence[GraphReport], density: float | None) -> str:
    """What happened to a model: for each graph its decisions, modes and layers.

    Args:
        graphs: compiled graphs, in the order of compilation.
        density: realised mean over all of them, None before the first sparse call.
    """
    if not graphs:
        return "This model has not run under ditopt yet."
    parts = []
    for number, graph in enumerate(graphs):
        modes = ", ".join(f"{name} {count}" for name, count in graph.calls.items()) or "none"
        cache = {True: "warm cache", False: "cold cache", None: "not compiled yet"}[graph.warm]
        title = f"{_title(number, len(graphs), graph.record)}; {cache}; calls: {modes}"
        parts.append(render_decisions(graph.record.decisions, title))
        if graph.lacks_step:
            parts.append(WITHOUT_STEP)
        elif graph.record.replaced and set(graph.calls) == {Mode.DENSE.value}:
            parts.append(ALL_DENSE)
        if graph.layers:
            parts.append(_render_layers(graph.layers))
            kept = sum(layer.plan_bytes for layer in graph.layers)
            parts.append(f"Plans kept between steps take {kept / 1e6:.3g} MB.")
        if any(layer.differences for layer in graph.layers):
            parts.append(_render_differences(graph.layers))
    if density is not None:
        parts.append(f"Mean density over sparse steps: {density:.3f}")
    return "\n\n".join(parts)


def summarise(record: GraphRecord) -> str:
    """One line: how many sites were replaced and why the others were not."""
    total = len(record.decisions)
    left = Counter(d.reason.name for d in record.decisions if not d.replaced)
    reasons = ", ".join(f"{name} {count}" for name, count in left.most_common())
    line = f"ditopt: {len(record.replaced)} of {total} attention sites replaced"
    return line + (f" (left alone: {reasons})" if reasons else "")


def _title(number: int, count: int, record: GraphRecord) -> str:
    name = f"graph {number} of {count}: " if count > 1 else ""
    timestep = record.timestep or "none found"
    more = "".join(f"; {each.summary}" for each in record.passes if each.summary)
    return f"{name}{summarise(record)}; timestep: {timestep}{more}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _render_layers(layers: Sequence[LayerReport]) -> str:
    rows = [
        {
            "module": layer.module,
            "layer": layer.layer,
            "branch": str(layer.branch),
            "density": f"{layer.density:.3f}",
            "recall": "" if layer.recall is None else f"{layer.recall:.3f}",
            "heads": _join(layer.heads, ""),
            "density by type": _join(layer.density_by_type, ".3f"),
            "sparse calls": str(layer.calls),
            "searches": str(layer.searches),
            "guard": _describe_guard(layer.guard),
        }
        for layer in layers
    ]
    return tabulate(rows, headers="keys", disable_numparse=True)


def _join(figures: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{kind} {figure:{form}}" for kind, figure in sorted(figures.items()))


def _describe_guard(guard: GuardReport | None) -> str:
    if guard is None:
        return "off"
    text = f"kept {guard.kept:.3f}, error {guard.error:.3f}, caught {guard.caught}"
    return text + (f", dense {guard.dense_heads}" if guard.dense_heads else "")


def _render_differences(layers: Sequence[LayerReport]) -> str:
    """Relative differences to dense attention, layer by step, and what to keep dense."""
    steps = sorted({step for layer in layers for step in layer.differences})
    rows = [
        [layer.module, str(layer.branch)]
        + [f"{layer.differences[s]:.3f}" if s in layer.differences else "" for s in steps]
        for layer in layers
    ]
    headers = ["difference to dense", "branch", *(f"step {s}" for s in steps)]
    table = tabulate(rows, headers=headers, disable_numparse=True)
    return f"{table}\n{suggest_dense(layers)}"


def _group_layers(decisions: Sequence[SiteDecision]) -> list[tuple[str, list[SiteDecision]]]:
    """Decisions that say the same about modules that differ by layer number only."""
    groups: dict[SiteDecision, list[SiteDecision]] = {}
    for decision in decisions:
        # hashable: every field of a decision is frozen
        key = replace(decision, site=0, module=_star(decision.module))
        groups.setdefault(key, []).append(decision)
    return [(_name_group(members), members) for members in groups.values()]


def _star(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def _name_group(members: list[SiteDecision]) -> str:
    first = members[0].module or "(top level)"
    if len(members) == 1:
        return first
    return f"{_star(first)} (x{len(members)})"


def _make_row(name: str, members: list[SiteDecision]) -> dict[str, str]:
    first = members[0]
    sites = str(first.site) if len(members) == 1 else f"{first.site}..{members[-1].site}"
    query, key = (*first.shapes, "", "")[:2]
    return {
        "site": sites,
        "module": name,
        "decision": first.reason.name + (f" by {first.router}" if first.router else ""),
        "tokens": _describe_tokens(first.layout),
        "grid": _describe_grid(first.layout),
        "query": query,
        "key": key,
        "GFLOP dense": _describe_flops(first.flops_dense),
        "sparse": _describe_flops(first.flops_sparse),
        "gain": "" if first.gain is None else f"{first.gain:.2f}x",
        "pays from": "" if first.pays_from is None else f"{first.pays_from:,} tokens",
        "source": first.source,
    }


def _describe_tokens(layout: LayoutSummary | None) -> str:
    if layout is None:
        return ""
    return " ".join(filter(None, (layout.kind, " + ".join(layout.segments))))


def _describe_grid(layout: LayoutSummary | None) -> str:
    if layout is None or layout.grid is None:
        return ""
    return f"{' x '.join(map(str, layout.grid))} ({layout.grid_source})"


def _describe_flops(flops: Size | None) -> str:
    if flops is None:
        return ""
    value = sympy.sympify(flops) / 10**9
    return f"{float(value):.3g}" if value.is_number else str(flops)


def _explain_reasons(decisions: Sequence[SiteDecision]) -> list[str]:
    """One line for each reason to leave a site alone or without a grid, and for each detail."""
    lines: dict[str, None] = {}
    for decision in decisions:
        if decision.reason is AttentionReason.REPLACED:
            if decision.detail:
                text = "Replaced without a grid, in the model's own order of tokens"
                lines[f"{text} [{decision.detail}]"] = None
            continue
        detail = f" [{decision.detail}]" if decision.detail else ""
        lines[f"{decision.reason.name}: {decision.reason}{detail}"] = None
    return list(lines)
