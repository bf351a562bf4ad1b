from __future__ import annotations

import pytest
import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt._compat import FloorDiv, Mod, size_expression
from dit_opt.program.sizes import SizeWriter, count_outputs, find_unknown_symbols, read_sizes
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


EXPRESSIONS = [
    lambda a, b: a,
    lambda a, b: a * b + 3,
    lambda a, b: 2 * a * b - b,
    lambda a, b: a**2 + b**2,
    lambda a, b: FloorDiv(a * b + 5, 4),
    lambda a, b: Mod(a * b, 7) + a,
]


def make_arguments(gm, hints):
    """Inputs of the graph whose sizes are those of `hints`."""
    args = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        if isinstance(value, torch.SymInt):
            args.append(hints[size_expression(value)])
        else:
            args.append(torch.ones([int(size_expression(s).subs(hints)) for s in value.shape]))
    return args


@pytest.mark.parametrize("make_expression", EXPRESSIONS)
def test_a_written_expression_computes_its_value(make_expression):
    gm, symbols = make()
    a, b = symbols[:2]
    expression = make_expression(a, b)
    hints = {s: 5 + i for i, s in enumerate(symbols)}
    args = make_arguments(gm, hints)
    written = SizeWriter(gm.graph).write(expression)
    # later passes read it from the node
    assert size_expression(written.meta["example_value"]) == expression
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


def test_what_is_written_stands_right_behind_the_inputs():
    gm, (a, b, *_) = make()
    writer = SizeWriter(gm.graph)
    inputs = gm.graph.find_nodes(op="placeholder")
    assert writer.next_node() is inputs[-1].next
    first, second = writer.write(a * b), writer.write(a + b)
    assert inputs[-1] < first < second < writer.next_node()
    assert second.next is writer.next_node()


def test_other_functions_are_an_error():
    gm, (a, *_) = make()
    with pytest.raises(KeyError, match=r"not made of"):
        SizeWriter(gm.graph).write(sympy.Max(a, 7))


@pytest.mark.parametrize("make_expression", EXPRESSIONS)
def test_arguments_of_a_call_tell_a_size(make_expression):
    gm, symbols = make()
    expression = make_expression(*symbols[:2])
    read = read_sizes([expression, 3], gm.graph)
    for first in (5, 11):
        hints = {s: first + i for i, s in enumerate(symbols)}
        found = read(tuple(make_arguments(gm, hints)))
        assert found == [int(expression.subs(hints)), 3]
        assert all(type(size) is int for size in found)


def test_sizes_that_are_numbers_need_no_arguments():
    gm, _ = make()
    assert read_sizes([sympy.Integer(7), 3], gm.graph)(()) == [7, 3]
    assert read_sizes([], gm.graph)(()) == []


def test_symbols_that_no_input_has_are_named():
    gm, (a, b, *_) = make()
    other = sympy.Symbol("u0")
    assert find_unknown_symbols(gm.graph, [a * b, 3, other + a]) == [other]
    assert find_unknown_symbols(gm.graph, [a, sympy.Integer(3)]) == []


def test_outputs_are_counted():
    assert count_outputs(capture_one(lambda x: (x + 1, x + 2), torch.ones(2))) == 2
