"""What ditopt would do with a model, before anything is compiled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from dit_opt import passes
from dit_opt._compat import forget_compiled, fresh_code
from dit_opt.decisions import GraphRecord, SiteDecision
from dit_opt.facts.graph import InputHints
from dit_opt.inspect.text import render_records
from dit_opt.options import Options
from dit_opt.passes.base import run
from dit_opt.program.dump import Dumper
from dit_opt.program.program import Program
from dit_opt.runtime.bound import WITHOUT_STEP
from dit_opt.runtime.handover import read_spans, tag_outputs
from dit_opt.runtime.token_ids import read_grid


class NothingTraced(RuntimeError):
    """Dynamo made no graph of a model, so there is nothing to explain."""


@dataclass(frozen=True)
class Explanation:
    """One record for each graph that Dynamo makes of a model; `str()` gives the table.

    `lacks_step`: there is a dense start to wait for, but no input of a graph tells the step, so
    that all of it would stay dense.
    """

    graphs: tuple[GraphRecord, ...]
    lacks_step: bool = False

    @property
    def decisions(self) -> tuple[SiteDecision, ...]:
        return tuple(d for g in self.graphs for d in g.decisions)

    def to_json(self) -> str:
        graphs = [g.to_json() for g in self.graphs]
        return json.dumps({"lacks_step": self.lacks_step, "graphs": graphs}, indent=1)

    def __str__(self) -> str:
        text = render_records(self.graphs)
        return f"{text}\n\n{WITHOUT_STEP}" if self.lacks_step else text


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
    parsed = Options.parse(options)
    records: list[GraphRecord] = []
    errors: list[Exception] = []

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        hints = InputHints()
        if parsed.grid is None:
            spans = read_spans(enumerate(inputs))
            hints = InputHints(spans, lambda ids: read_grid(inputs[ids.argument], *ids[1:]))
        program = Program(gm, hints)
        spans = program.facts.tokens.spans
        try:
            found = run(passes.PASSES, program, parsed, Dumper(None)).record
        except ValueError as error:
            # raised below: out of a backend, Dynamo would wrap it
            errors.append(error)
            return gm.forward
        records.append(found)
        forward = gm.forward

        def call(*args: Any) -> Any:
            outputs = forward(*args)
            tag_outputs(outputs, spans, None)
            return outputs

        return call

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
    # a graph with a timestep hands the step on to those after it
    lacks_step = bool(
        parsed.effective_dense_steps
        and any(record.replaced for record in records)
        and not any(record.timestep for record in records)
    )
    return Explanation(tuple(records), lacks_step)
