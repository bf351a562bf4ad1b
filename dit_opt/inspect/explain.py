"""What ditopt would do with a model, before anything is compiled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from dit_opt._compat import forget_compiled, fresh_code
from dit_opt.decisions import Decision, GraphRecord
from dit_opt.inspect.render import render_records
from dit_opt.options import Options
from dit_opt.runtime.handover import tell, told_spans
from dit_opt.runtime.positions import read_grid


class NothingTraced(RuntimeError):
    """Dynamo made no graph of a model, so there is nothing to explain."""


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

    Traces the model with Dynamo and runs it once without compiling; no GPU is needed. What is
    compiled already, and what is compiled later, is as if it had not been traced.

    Args:
        model: the denoiser, compiled or not. args, kwargs: its inputs, as in a call.
        options: as for `torch.compile(model, backend="ditopt", options=...)`.

    Raises:
        OptionError: the options are wrong, in themselves or for this model.
        NothingTraced: Dynamo made no graph of it.
    """
    from dit_opt.backend import analyse

    parsed = Options.parse(options)
    records: list[GraphRecord] = []
    errors: list[Exception] = []

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        try:
            if parsed.grid is not None:
                analysis, passes = analyse(gm, parsed)
            else:
                told = told_spans(enumerate(inputs))
                analysis, passes = analyse(
                    gm, parsed, told=told, read=lambda p: read_grid(inputs[p.argument], *p[1:])
                )
        except ValueError as error:
            # raised below: out of a backend, Dynamo would wrap it
            errors.append(error)
            return gm.forward
        records.append(analysis.describe(passes))
        forward = gm.forward

        def run(*args: Any) -> Any:
            outputs = forward(*args)
            tell(outputs, analysis.tokens.spans, None)
            return outputs

        return run

    # an OptimizedModule has the model inside
    model = getattr(model, "_orig_mod", model)
    with torch.no_grad(), forget_compiled():
        torch.compile(fresh_code(model.forward), backend=record)(*args, **kwargs)
    if errors:
        raise errors[0]
    if not records:
        raise NothingTraced(
            f"Dynamo made no graph of {type(model).__name__}.forward. It must compute something "
            "with tensors, and Dynamo must be on (no TORCHDYNAMO_DISABLE=1, and not called from "
            "compiled code); TORCH_LOGS=graph_breaks tells what it left out."
        )
    return Explanation(tuple(records))
