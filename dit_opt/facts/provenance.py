"""Which input tells the step, and which parameter tells the layer.

The step is what the graph does with an input, not what the input is called: names differ between
models. The layer is where the module that makes the call keeps its parameters.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from dit_opt._compat import belongs_to_model, parameter_path, size_expression
from dit_opt.facts.nodes import op_name
from dit_opt.facts.sites import Site


@dataclass(frozen=True)
class Timestep:
    """The inputs that may be the timestep.

    Attributes:
        candidates: placeholders that feed a sinusoidal embedding, in graph order. A distilled model
            embeds its guidance scale alike; only the timestep changes between steps, so the run
            time can tell them apart and the graph cannot.
        index: position of the first candidate among the graph's placeholders.
        per_token: whether the first candidate has a timestep for each token, `[B, N]`.
    """

    candidates: tuple[Node, ...]
    index: int
    per_token: bool

    @property
    def placeholder(self) -> Node:
        """The first candidate."""
        return self.candidates[0]


def find_timestep(graph: Graph) -> Timestep | None:
    """The inputs that feed a sinusoidal embedding; None where there is none (a lone block).

    An embedding is the sine and the cosine of one tensor, joined and handed to a linear layer,
    where that tensor is made from an input of at most two dimensions. Rotary tables are sines and
    cosines too, but they multiply queries instead of feeding a layer.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    sines = {n.args[0] for n in graph.nodes if _is_function(n, "sin") and n.args}
    found: set[Node] = set()
    for node in graph.nodes:
        if not _is_function(node, "cos") or not node.args or node.args[0] not in sines:
            continue
        angle = node.args[0]
        if isinstance(angle, Node) and feeds_layer(node):
            found.update(_scalar_inputs(angle))
    candidates = tuple(n for n in placeholders if n in found)
    if not candidates:
        return None
    shape = candidates[0].meta["example_value"].shape
    per_token = len(shape) == 2 and size_expression(shape[1]) != 1
    return Timestep(candidates, placeholders.index(candidates[0]), per_token)


def layer_anchor(site: Site, graph: Graph) -> Node | None:
    """The placeholder of a parameter that only this site's layer has, or None.

    A parameter of the module that makes the call, else the nearest one that the query comes from.
    At run time the parameter's identity tells the layers of one compiled block apart.
    """
    owner = tuple(site.module.split(".")) if site.module else ()
    if owner:
        for node in graph.find_nodes(op="placeholder"):
            path = parameter_path(node)
            if path is not None and path[: len(owner)] == owner:
                return node
    if site.query is None:
        return None
    return next((n for n in _ancestors(site.query) if parameter_path(n) is not None), None)


def model_anchor(graph: Graph) -> Node | None:
    """The placeholder of the graph's first parameter, or None where it has no parameters."""
    placeholders = graph.find_nodes(op="placeholder")
    return next((n for n in placeholders if parameter_path(n) is not None), None)


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
    for ancestor in _ancestors(node):
        value = ancestor.meta.get("example_value")
        is_input = ancestor.op == "placeholder" and isinstance(value, torch.Tensor)
        if is_input and value.dim() <= 2 and not belongs_to_model(ancestor):
            yield ancestor


def _ancestors(node: Node) -> Iterator[Node]:
    """The node and all tensors that it is computed from, nearest first.

    Sizes are no way back: a timestep expanded to the batch of the latents is not made from them.
    """
    queue, seen = deque([node]), {node}
    while queue:
        current = queue.popleft()
        yield current
        for parent in current.all_input_nodes:
            if parent not in seen and isinstance(parent.meta.get("example_value"), _VALUES):
                seen.add(parent)
                queue.append(parent)


_VALUES = (torch.Tensor, tuple, list)
