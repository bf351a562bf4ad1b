from __future__ import annotations

import operator

import torch

from dit_opt.facts.writes import find_bases, find_write
from tests.graphs import capture_one

X = torch.randn(4, 6)


def capture(function):
    """The graph's nodes by the names that Dynamo gives them: those of the variables."""
    gm = capture_one(lambda x: function(x * 1.0), X)
    return {node.name: node for node in gm.graph.nodes}


def test_views_by_op_and_by_storage():
    def function(x):
        listed = x.transpose(0, 1)
        unlisted = torch.einsum("ij->ji", x)
        strided = torch.as_strided(x, (3,), (1,))
        wider, _ = torch.broadcast_tensors(x, torch.zeros(2, 1, 1))
        copied = torch.einsum("ij->i", x)
        return listed + 1, unlisted + 1, strided + 1, wider + 1, copied + 1

    nodes = capture(function)
    x = next(n for n in nodes.values() if n.name != "l_x_" and n.op == "call_function")
    for name in ("listed", "unlisted", "strided", "broadcast_tensors"):
        assert x in find_bases(nodes[name]), name
    assert find_bases(nodes["copied"]) == []


def test_a_size_is_another_name_of_nothing():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    shape = graph.call_function(getattr, (x, "shape"))
    rows = graph.call_function(operator.getitem, (shape, 0))
    x.meta["example_value"], shape.meta["example_value"] = X, X.shape
    rows.meta["example_value"] = 4
    graph.call_function(operator.iadd, (rows, 1))
    assert find_write([x]) is None


def test_writes_are_found_under_every_name_and_only_in_time():
    def function(x):
        first, second = x.chunk(2, -1)
        early = second.mul_(2.0)
        middle = first + 1
        late = early.t().zero_()
        return middle + 1, late + 1, x + 1

    nodes = capture(function)
    chunked = next(n for n in nodes.values() if n.target == "chunk")
    x = chunked.args[0]
    early, middle, late = (nodes[name] for name in ("early", "middle", "late"))
    # in no order: either is a write to the memory of x
    assert find_write([x]) in (early, late)
    assert find_write([x], known=[early]) is late
    assert find_write([x], after=early) is find_write([early]) is late
    assert find_write([x], before=middle) is early
    assert find_write([x], after=middle, before=late) is None
    assert find_write([middle]) is None
    # a value made by a write counts from there
    assert find_write([early], known=[late]) is None


def test_what_has_no_storage_is_known_by_its_op():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    view, copy = graph.call_method("view", (x, -1)), graph.call_method("clone", (x,))
    x.meta["example_value"] = torch.eye(2).to_sparse()
    assert find_bases(view) == [x] and find_bases(copy) == []
    write = graph.call_method("zero_", (view,))
    assert find_write([x]) is write and find_write([copy]) is None
