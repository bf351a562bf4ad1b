"""Nodes: who gives a graph input, what a value is computed from, sizes and numbers.

Rules and facts read nodes only through these, so that none of them adds a guard.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch.fx import Node

from dit_opt._compat import proved_sizes, size_expression


def is_user_input(node: Node) -> bool:
    """Whether a graph input is an argument of the call, not a weight or buffer of the module."""
    if node.op == "get_attr" or isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return False
    # Buffers look like any other tensor; Dynamo names inputs after where it found them.
    return not re.search(r"_(parameters|buffers)_|^l_self_|^g_", node.name)


def input_name(node: Node) -> str:
    """The name of a graph input; for one of the user's, that of the model's argument."""
    return re.sub(r"^l_(kwargs_)?|_$", "", node.name) if is_user_input(node) else node.name


def walk_ancestors(node: Node) -> Iterator[Node]:
    """The node and all tensors that it is computed from, nearest first.

    Sizes are not followed: a timestep expanded to the batch of the latents is not made from them.
    """
    queue, seen = deque([node]), {node}
    while queue:
        current = queue.popleft()
        yield current
        for parent in current.all_input_nodes:
            if parent not in seen and holds_tensor(parent.meta.get("example_value")):
                seen.add(parent)
                queue.append(parent)


def sizes_of(value: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The shape as expressions; adds no guard."""
    return tuple(size_expression(s) for s in value.shape)


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node; None for any other value."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def example_of(node: Node | None) -> torch.Tensor:
    """The fake tensor of a node that is known to be there and to have one."""
    assert node is not None
    return node.meta["example_value"]


def shape_of(node: Any) -> tuple[sympy.Expr, ...]:
    """The shape of a node's tensor as expressions, which add no guard; () for any other value."""
    value = tensor_of(node)
    return () if value is None else sizes_of(value)


def number_of(value: Any) -> sympy.Expr | None:
    """An argument that is an int or a node of a size, as an expression; None for anything else."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return size_expression(value)
    return None


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor or a tuple with one."""
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def find_proved_sizes(nodes: Iterable[Node]) -> dict[sympy.Symbol, sympy.Expr]:
    """What the guards of a graph prove about its sizes, as substitutions."""
    for node in nodes:
        value = node.meta.get("example_value")
        for length in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(length, torch.SymInt):
                return proved_sizes(length)
    return {}


def find_data(nodes: Iterable[Node]) -> set[Node]:
    """The tensors that depend on the user's tensors."""
    data: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            if isinstance(node.meta.get("example_value"), torch.Tensor) and is_user_input(node):
                data.add(node)
        elif holds_tensor(node.meta.get("example_value")):
            data.update([node] if any(n in data for n in node.all_input_nodes) else [])
    return data
