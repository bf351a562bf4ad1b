"""What the arguments and outputs of a traced graph mean to whoever calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Graph

from dit_opt.facts.anchors import find_model_anchor
from dit_opt.facts.graph import Facts
from dit_opt.facts.nodes import is_user_input
from dit_opt.facts.spans import Spans
from dit_opt.program.sizes import count_outputs


@dataclass(frozen=True)
class Signature:
    """Positions among the arguments and outputs of a graph.

    Attributes:
        outputs: how many values the model's own graph returns.
        timesteps: the arguments that may be the timestep.
        model: an argument that is a parameter and so identifies the model; None where it has none.
        user_inputs: the arguments that are not the model's own.
        spans: how the tokens lie in outputs, by their position.
        forwards_latents: another graph of the model attends over the latents.
    """

    outputs: int
    timesteps: tuple[int, ...] = ()
    model: int | None = None
    user_inputs: tuple[int, ...] = ()
    spans: Mapping[int, Spans] = field(default_factory=dict)
    forwards_latents: bool = False


def find_user_inputs(graph: Graph) -> tuple[int, ...]:
    """Positions of the inputs that are not the model's own."""
    placeholders = graph.find_nodes(op="placeholder")
    return tuple(i for i, node in enumerate(placeholders) if is_user_input(node))


def read_signature(facts: Facts) -> Signature:
    """The signature of a graph as Dynamo made it."""
    placeholders = facts.graph.find_nodes(op="placeholder")
    timestep, model = facts.timestep, find_model_anchor(facts.graph)
    return Signature(
        outputs=count_outputs(facts.gm),
        timesteps=() if timestep is None else tuple(map(placeholders.index, timestep.candidates)),
        model=None if model is None else placeholders.index(model),
        user_inputs=find_user_inputs(facts.graph),
        spans=facts.tokens.spans,
        forwards_latents=facts.tokens.forwards_latents,
    )
