"""New nodes with everything that the nodes of Dynamo have: a value, a module and a source line."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from dit_opt._compat import without_guards

# Of a node's meta, what tells where the model makes it.
ORIGIN = ("stack_trace", "nn_module_stack")


class Emitter:
    """Writes nodes at the insertion point of a graph.

    Each gets the fake value that its meta kernel computes, so that facts and passes can read it,
    and the module and source line of `like`. No guard is added under dynamic shapes.
    """

    def __init__(self, graph: Graph, like: Node) -> None:
        self.graph = graph
        self._origin = {key: like.meta[key] for key in ORIGIN if key in like.meta}
        self._like = like.meta.get("example_value")

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of a function or an operator."""
        return self._describe(self.graph.call_function(function, args, kwargs), function)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """A call of a tensor's method; the tensor comes first."""
        node = self.graph.call_method(name, args, kwargs)
        return self._describe(node, lambda x, *rest, **named: getattr(x, name)(*rest, **named))

    def unpack(self, node: Node, count: int) -> list[Node]:
        """The first `count` results of a node that returns a tuple."""
        return [self.call(operator.getitem, node, i) for i in range(count)]

    def size(self, node: Node, dim: int) -> int | Node:
        """A size of a tensor: a number where it is static."""
        size = node.meta["example_value"].shape[dim]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, dim)

    def _describe(self, node: Node, function: Callable[..., Any]) -> Node:
        node.meta.update(self._origin)
        values = map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        node.meta["example_value"] = evaluate(function, *values, like=self._like)
        return node


def evaluate(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], like: Any = None
) -> Any:
    """What a function returns for fake values; no guard is added.

    `like` is a fake tensor of the same graph, for a function that is given none.
    """
    with without_guards([*args, *kwargs.values(), like]), torch.no_grad():
        return function(*args, **kwargs)
