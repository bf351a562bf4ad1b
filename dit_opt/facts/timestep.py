"""The inputs that may be the timestep, recognised by what the graph does with them, not by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node

from dit_opt._compat import belongs_to_model
from dit_opt.facts.nodes import tensor_of, walk_ancestors
from dit_opt.facts.ops import Trait, has, is_op


@dataclass(frozen=True)
class Timestep:
    """The inputs that may be the timestep.

    Attributes:
        candidates: placeholders that feed a sinusoidal embedding, in graph order. A distilled model
            embeds its guidance scale in the same way; only the timestep changes between steps,
            which the run time sees and the graph does not.
    """

    candidates: tuple[Node, ...]


def find_timestep(graph: Graph) -> Timestep | None:
    """The inputs that feed a sinusoidal embedding; None where there is none (a lone block).

    An embedding is the sine and the cosine of one tensor, joined and handed to a linear layer,
    where that tensor is made from an input of at most two dimensions. Rotary tables are sines and
    cosines too, but they multiply queries instead of feeding a layer.
    """
    sines = {n.args[0] for n in graph.nodes if is_op(n, "sin") and n.args}
    found: set[Node] = set()
    for node in graph.nodes:
        if not is_op(node, "cos") or not node.args or node.args[0] not in sines:
            continue
        angle = node.args[0]
        if isinstance(angle, Node) and feeds_layer(node):
            found.update(_scalar_inputs(angle))
    candidates = tuple(n for n in graph.find_nodes(op="placeholder") if n in found)
    return Timestep(candidates) if candidates else None


# The value moves to another place or another dtype, and nothing is computed from it.
_MOVES = (
    Trait.CAST
    | Trait.COPY
    | Trait.RESHAPE
    | Trait.PERMUTE
    | Trait.REPEAT
    | Trait.SLICE
    | Trait.JOIN
)


def feeds_layer(node: Node) -> bool:
    """Whether a value reaches a linear layer through nothing but moves and casts."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if has(user, Trait.LINEAR):
                return True
            if has(user, _MOVES) and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _scalar_inputs(node: Node) -> Iterator[Node]:
    """The user's tensors of at most two dimensions that a value is computed from."""
    for ancestor in walk_ancestors(node):
        value = tensor_of(ancestor)
        if ancestor.op != "placeholder" or belongs_to_model(ancestor):
            continue
        if value is not None and value.dim() <= 2:
            yield ancestor
