"""Sizes known as sympy expressions: written into a graph, and read from the arguments of a call.

Facts are expressions over the symbols of a graph; ops want arguments, and the runtime numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt._compat import FloorDiv, Mod, PythonMod, size_expression

# What torch writes sizes with; sympy has no exact integer forms of its own.
_SIZE_FUNCTIONS = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}
_OPERATORS: dict[type, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}


def find_unknown_symbols(graph: Graph, expressions: Iterable[sympy.Expr | int]) -> list[Any]:
    """The symbols, by name, that no input of a graph tells: sizes made by `.item()` or a mask."""
    free: set[Any] = set().union(*(sympy.sympify(e).free_symbols for e in expressions))
    return sorted(free.difference(_find_sizes(graph)), key=str) if free else []


class SizeWriter:
    """Writes expressions over the symbols of one graph, each symbol and result once.

    Symbols are taken from the graph's own size inputs, else read off the shape of an input tensor.
    New nodes stand right after the placeholders. Raises KeyError for a symbol that no input has.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._written: dict[sympy.Expr, int | Node] = {}
        self._inputs = graph.find_nodes(op="placeholder")
        self._last = self._inputs[-1] if self._inputs else None
        self._sizes = _find_sizes(graph)
        for size, (i, dim) in self._sizes.items():
            if dim is None:
                self._written[size] = self._inputs[i]

    def write(self, expression: sympy.Expr | int) -> int | Node:
        """An int where the expression is a number, else the node that computes it."""
        expression = sympy.sympify(expression)
        if expression.is_Integer:
            return int(expression)
        if expression not in self._written:
            self._written[expression] = self._compute(expression)
        return self._written[expression]

    def next_node(self) -> Node:
        """The node behind all that was written: what is made before it sees every input."""
        return next(iter(self._graph.nodes)) if self._last is None else self._last.next

    def _compute(self, expression: sympy.Expr) -> Node:
        if expression.is_Symbol:
            if expression not in self._sizes:
                raise KeyError(f"No input of the graph has the size {expression}.")
            i, dim = self._sizes[expression]
            return self._add("call_method", "size", (self._inputs[i], dim))
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer:
            # torch keeps squares of sizes as powers
            parts = [self.write(expression.base)] * int(expression.exp)
            return self._fold(operator.mul, parts)
        terms: Any = expression.args
        parts = [self.write(term) for term in terms]
        for kind, function in _OPERATORS.items():
            if isinstance(expression, kind):
                return self._fold(function, parts)
        raise KeyError(f"The size {expression} is not made of +, *, // and %.")

    def _fold(self, function: Callable[..., Any], parts: list[int | Node]) -> Node:
        result = parts[0]
        for part in parts[1:]:
            result = self._add("call_function", function, (result, part))
        assert isinstance(result, Node)
        return result

    def _add(self, op: str, target: Any, args: tuple[Any, ...]) -> Node:
        if self._last is None:
            place = self._graph.inserting_before(next(iter(self._graph.nodes)))
        else:
            place = self._graph.inserting_after(self._last)
        with place:
            self._last = self._graph.create_node(op, target, args)
        values = [a.meta["example_value"] if isinstance(a, Node) else a for a in args]
        # of SymInts: another expression, and no guard
        value = getattr(values[0], target)(*values[1:]) if op == "call_method" else target(*values)
        self._last.meta["example_value"] = value
        return self._last


def _find_sizes(graph: Graph) -> dict[sympy.Expr, tuple[int, int | None]]:
    """Where the inputs of a graph have each symbolic size: (position, dimension).

    The dimension is None where an input is the size itself; such are preferred.
    """
    found: dict[sympy.Expr, tuple[int, int | None]] = {}
    values = [node.meta.get("example_value") for node in graph.find_nodes(op="placeholder")]
    for i, value in enumerate(values):
        if isinstance(value, torch.SymInt):
            found.setdefault(size_expression(value), (i, None))
    for i, value in enumerate(values):
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt):
                found.setdefault(size_expression(size), (i, dim))
    return found


def count_outputs(gm: GraphModule) -> int:
    """How many values a graph returns."""
    (output,) = gm.graph.find_nodes(op="output")
    return len(output.args[0])


def read_sizes(
    expressions: Sequence[sympy.Expr | int], graph: Graph
) -> Callable[[tuple[Any, ...]], list[int]]:
    """A function from the arguments of a call to the values of size expressions."""
    sizes = _find_sizes(graph)
    wanted = [sympy.sympify(e) for e in expressions]
    free: list[Any] = sorted(set().union(*(e.free_symbols for e in wanted)), key=str)
    if not free:
        constants = [int(e) for e in wanted]
        return lambda args: constants
    compute = sympy.lambdify(free, wanted, modules=[_SIZE_FUNCTIONS, "math"])

    def read(args: tuple[Any, ...]) -> list[int]:
        values = []
        for symbol in free:
            i, dim = sizes[symbol]
            values.append(int(args[i]) if dim is None else args[i].shape[dim])
        return [int(v) for v in compute(*values)]

    return read
