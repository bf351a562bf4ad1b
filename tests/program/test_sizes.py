from __future__ import annotations

import pytest
import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt._compat import size_expression
from dit_opt.program.sizes import SizeWriter
from tests.graphs import capture_one


def make():
    """A graph with two symbolic sizes that Dynamo passes as inputs or in shapes."""

    def function(x, y):
        return x.sum() + y.sum() * x.shape[0]

    gm = capture_one(function, torch.ones(6, 8), torch.ones(10, 4), dynamic=True)
    symbols = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        sizes = [value] if isinstance(value, torch.SymInt) else value.shape
        symbols += [size_expression(s) for s in sizes if isinstance(s, torch.SymInt)]
    return gm, list(dict.fromkeys(s for s in symbols if s.is_Symbol))


def evaluate(gm: GraphModule, value: Node | int, *args):
    if isinstance(value, int):
        return value
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((value,),)
    gm.graph.lint()
    gm.recompile()
    return gm(*args)[0]


@pytest.mark.parametrize(
    "make_expression",
    [
        lambda a, b: a,
        lambda a, b: a * b + 3,
        lambda a, b: 2 * a * b - b,
        lambda a, b: a**2 + b**2,
    ],
)
def test_a_written_expression_computes_its_value(make_expression):
    gm, symbols = make()
    a, b = symbols[:2]
    expression = make_expression(a, b)
    placeholders = gm.graph.find_nodes(op="placeholder")
    args = []
    hints = {s: 5 + i for i, s in enumerate(symbols)}
    for node in placeholders:
        value = node.meta["example_value"]
        if isinstance(value, torch.SymInt):
            args.append(hints[size_expression(value)])
        else:
            args.append(torch.ones([int(size_expression(s).subs(hints)) for s in value.shape]))
    written = SizeWriter(gm.graph).write(expression)
    assert evaluate(gm, written, *args) == int(expression.subs(hints))


def test_numbers_need_no_node():
    graph = Graph()
    writer = SizeWriter(graph)
    assert writer.write(sympy.Integer(7)) == writer.write(7) == 7
    assert not list(graph.nodes)


def test_the_same_expression_is_written_once():
    gm, (a, b, *_) = make()
    writer = SizeWriter(gm.graph)
    first = writer.write(a * b)
    count = len(gm.graph.nodes)
    assert writer.write(a * b) is first
    assert len(gm.graph.nodes) == count


def test_an_unknown_symbol_is_an_error():
    gm, _ = make()
    with pytest.raises(KeyError, match="No input"):
        SizeWriter(gm.graph).write(sympy.Symbol("elsewhere"))
