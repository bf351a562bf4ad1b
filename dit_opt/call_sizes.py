"""What the arguments of a call tell about its sizes: batch, heads and tokens of each site."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from dit_opt._compat import size_expression
from dit_opt.passes.sparse_site import SparseSite

# What torch writes sizes with; sympy has no exact integer forms of its own.
_SIZE_FUNCTIONS = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}


def count_heads(sparse: SparseSite) -> tuple[sympy.Expr, sympy.Expr]:
    """Batch and heads; the pass sees `[B * H, N, D]` as B * H items of one head."""
    shape = sparse.example.shape
    if len(shape) == 3:
        return size_expression(shape[0]), sympy.Integer(1)
    return size_expression(shape[0]), size_expression(shape[1])


def count_tokens(sparse: SparseSite) -> sympy.Expr:
    return size_expression(sparse.example.shape[-2])


def count_outputs(gm: GraphModule) -> int:
    (output,) = gm.graph.find_nodes(op="output")
    return len(output.args[0])


def read_sizes(
    expressions: Sequence[Any], placeholders: list
) -> Callable[[tuple[Any, ...]], list[int]]:
    """A function from the arguments of a call to the values of size expressions."""
    symbols = {
        size_expression(value): i
        for i, n in enumerate(placeholders)
        if isinstance(value := n.meta.get("example_value"), torch.SymInt)
    }
    shapes = {
        size_expression(size): (i, dim)
        for i, n in enumerate(placeholders)
        if isinstance(value := n.meta.get("example_value"), torch.Tensor)
        for dim, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt)
    }
    wanted = [sympy.sympify(e) for e in expressions]
    free = sorted(set().union(*(e.free_symbols for e in wanted)), key=str)
    if not free:
        constants = [int(e) for e in wanted]
        return lambda args: constants
    compute = sympy.lambdify(free, wanted, modules=[_SIZE_FUNCTIONS, "math"])

    def read(args: tuple[Any, ...]) -> list[int]:
        values = []
        for symbol in free:
            if symbol in symbols:
                values.append(int(args[symbols[symbol]]))
            else:
                i, dim = shapes[symbol]
                values.append(args[i].shape[dim])
        return [int(v) for v in compute(*values)]

    return read
