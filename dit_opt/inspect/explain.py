"""What ditopt would do with a model, before anything is compiled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from dit_opt.decisions import Decision, GraphRecord
from dit_opt.inspect.render import render_records
from dit_opt.options import Options


@dataclass(frozen=True)
class Explanation:
    """One record for each graph that Dynamo makes of a model; `str()` gives the table."""

    graphs: tuple[GraphRecord, ...]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(d for g in self.graphs for d in g.decisions)

    def to_json(self) -> str:
        return json.dumps({"graphs": [g.to_json() for g in self.graphs]}, indent=1)

    def __str__(self) -> str:
        return render_records(self.graphs)


def explain(
    model: torch.nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """List every attention site of a model with decision, reason, shapes, FLOPs and predicted gain.

    Traces the model with Dynamo and runs it once without compiling; no GPU is needed.

    Args:
        model: the denoiser. args, kwargs: its inputs, as in a call.
        options: as for `torch.compile(model, backend="ditopt", options=...)`.

    Raises:
        OptionError: the options are wrong, in themselves or for this model.
    """
    from dit_opt.backend import analyse

    parsed = Options.parse(options)
    records: list[GraphRecord] = []
    errors: list[Exception] = []

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        try:
            analysis, passes = analyse(gm, parsed)
        except ValueError as error:
            # raised below: out of a backend, Dynamo would wrap it
            errors.append(error)
            return gm.forward
        records.append(analysis.describe(passes))
        return gm.forward

    traced = torch.compile(model.forward, backend=record)
    with torch.no_grad():
        traced(*args, **kwargs)
    if errors:
        raise errors[0]
    return Explanation(tuple(records))
