"""The inputs that may be the timestep: what the graph does with an input, not its name, tells."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from dit_opt._compat import belongs_to_model
from dit_opt.facts.nodes import op_name, walk_ancestors

__all__ = ["Timestep", "feeds_layer", "find_timestep"]


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
    sines = {n.args[0] for n in graph.nodes if _is_function(n, "sin") and n.args}
    found: set[Node] = set()
    for node in graph.nodes:
        if not _is_function(node, "cos") or not node.args or node.args[0] not in sines:
            continue
        angle = node.args[0]
        if isinstance(angle, Node) and feeds_layer(node):
            found.update(_scalar_inputs(angle))
    candidates = tuple(n for n in graph.find_nodes(op="placeholder") if n in found)
    return Timestep(candidates) if candidates else None


_LAYERS = (F.linear, torch.matmul, operator.matmul, torch.addmm, torch.mm, F.conv1d)
_CARRIERS = (
    "cat concat stack getitem to float half bfloat16 type type_as contiguous view reshape flatten "
    "unflatten squeeze unsqueeze pad permute transpose expand"
).split()


def _is_function(node: Node, name: str) -> bool:
    if node.op == "call_method":
        return node.target == name
    return node.op == "call_function" and node.target is getattr(torch, name)


def feeds_layer(node: Node) -> bool:
    """Whether a value reaches a linear layer through nothing but moves and casts."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and user.target in _LAYERS:
                return True
            if op_name(user) in _CARRIERS and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _scalar_inputs(node: Node) -> Iterator[Node]:
    """The user's tensors of at most two dimensions that a value is computed from."""
    for ancestor in walk_ancestors(node):
        value = ancestor.meta.get("example_value")
        is_input = ancestor.op == "placeholder" and isinstance(value, torch.Tensor)
        if is_input and value.dim() <= 2 and not belongs_to_model(ancestor):
            yield ancestor
