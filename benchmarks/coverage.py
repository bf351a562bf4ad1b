"""Which diffusers models does ditopt serve, and what does it say of the others?

    python -m benchmarks.coverage [--only NAME ...] [--density 0.25] [--json F]

Explains tiny models with random weights, one row for each: the graphs that Dynamo made, how many of
its attention sites over latents were replaced, the grid, and why the others were left alone. Sites
of cross-attention are not counted. Exits with 1 where a model cannot be built, run or explained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import dit_opt
from dit_opt.decisions import AttentionReason
from dit_opt.demo.machine import describe_run
from zoo import MODELS, Model

# Sites that are as they should be.
RIGHTLY_LEFT = (AttentionReason.TEXT_ONLY, AttentionReason.TOO_SHORT)


@dataclass(frozen=True)
class Row:
    """What ditopt does with one model.

    Attributes:
        name: in the zoo.
        model: its class in diffusers.
        graphs: how many Dynamo made.
        replaced, sites: of self- and joint attention, those that were replaced and all of them.
        grids: (T, H, W) of replaced sites, each once.
        left: how many sites were left alone for which reason, cross-attention included.
        error: type and first line of what went wrong, or "".
    """

    name: str
    model: str
    graphs: int = 0
    replaced: int = 0
    sites: int = 0
    grids: tuple[str, ...] = ()
    left: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def verdict(self) -> str:
        """Which of the sites that may be replaced were: all, some or none; "no sites", "error"."""
        if self.error:
            return "error"
        due = self.sites - sum(self.left.get(reason.name, 0) for reason in RIGHTLY_LEFT)
        if due == 0:
            return "no sites"
        return "all" if self.replaced == due else "some" if self.replaced else "none"


def explain_model(record: Model, density: float) -> Row:
    """Build a model, run it and explain it; whatever fails makes a row, too."""
    torch.compiler.reset()
    try:
        model, inputs = record.build()
        with torch.no_grad():
            # tables that are made in the first call are there in all later ones
            model(**inputs)
        options = {"density": density, "min_tokens": 0}
        explanation = dit_opt.explain(model, **inputs, options=options)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Row(record.name, record.class_name, error=f"{type(error).__name__}: {first}")
    decisions = explanation.decisions
    left = Counter(d.reason.name for d in decisions if not d.replaced)
    grids = [d.layout.grid for d in decisions if d.replaced and d.layout and d.layout.grid]
    return Row(
        record.name,
        record.class_name,
        graphs=len(explanation.graphs),
        replaced=len(decisions) - left.total(),
        sites=len(decisions) - left[AttentionReason.CROSS_ATTENTION.name],
        grids=tuple(dict.fromkeys(f"({', '.join(map(str, grid))})" for grid in grids)),
        left=dict(left),
    )


def render(rows: Sequence[Row]) -> str:
    """A line for each model, and how many have how much of their sites replaced."""
    table = []
    for row in rows:
        left = ", ".join(f"{reason} {count}" for reason, count in row.left.items())
        grids = "; ".join(row.grids) or "none"
        found = [row.graphs, f"{row.replaced} / {row.sites}", grids, left]
        table.append([row.name, row.model, *(["", "", "", row.error] if row.error else found)])
    headers = ["name", "class", "graphs", "replaced", "grid", "left alone"]
    return f"{tabulate(table, headers, disable_numparse=True)}\n{summarise(rows)}"


def summarise(rows: Sequence[Row]) -> str:
    """How many models have all, some and none of their sites replaced."""
    counts = Counter(row.verdict for row in rows)
    parts = [f"{counts[name]} {name}" for name in ("all", "some", "none")]
    line = f"self- and joint-attention sites replaced, of {len(rows)} models: {', '.join(parts)}"
    if counts["no sites"]:
        line += f"; {counts['no sites']} without such sites"
    return line + (f"; {counts['error']} with errors" if counts["error"] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    # diffusers announces what it deprecates, and ditopt where it replaced nothing: rows tell that
    warnings.filterwarnings("ignore")
    rows = [explain_model(MODELS[name], args.density) for name in args.only or MODELS]
    print(render(rows))
    if args.json:
        result: dict[str, Any] = {
            "density": args.density,
            "models": [{**dataclasses.asdict(row), "verdict": row.verdict} for row in rows],
            "summary": summarise(rows),
            **describe_run(),
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
