"""New nodes look like those that Dynamo made."""

from __future__ import annotations

import pytest
import torch

from dit_opt._compat import size_expression
from dit_opt.program.edit import append_outputs
from dit_opt.program.emit import ORIGIN, Emitter, evaluate
from tests.graphs import capture_one


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 6).requires_grad_(False)

    def forward(self, x):
        return self.linear(x).relu()


def make(dynamic=None):
    """A graph and an emitter at its end, for nodes that belong to the linear layer."""
    gm = capture_one(Layer(), torch.randn(5, 4), dynamic=dynamic)
    (linear,) = (n for n in gm.graph.nodes if n.name.startswith("linear"))
    (output,) = gm.graph.find_nodes(op="output")
    gm.graph.inserting_before(output)
    return gm, linear, Emitter(gm.graph, linear)


def run(gm, nodes, x):
    append_outputs(gm, nodes)
    gm.graph.lint()
    gm.recompile()
    args = [x if n.name == "l_x_" else n for n in gm.graph.find_nodes(op="placeholder")]
    module = Layer()
    values = {"weight": module.linear.weight, "bias": module.linear.bias}
    given = [
        a
        if isinstance(a, torch.Tensor)
        else next((v for name, v in values.items() if name in a.name), x.shape[0])
        for a in args
    ]
    return gm(*given)[1:], torch.nn.functional.linear(x, *values.values())


@pytest.mark.parametrize("dynamic", [None, True])
def test_every_node_has_a_value_a_module_and_a_line(dynamic):
    gm, linear, emit = make(dynamic)
    turned = emit.method("transpose", linear, 0, 1)
    added = emit.call(torch.add, turned, 1.0, alpha=2)
    top, where = emit.unpack(emit.call(torch.max, added, 1), 2)
    size = emit.size(linear, 0)
    for node in (turned, added, top, where):
        assert {key: node.meta[key] for key in ORIGIN} == {key: linear.meta[key] for key in ORIGIN}
    rows = size_expression(linear.meta["example_value"].shape[0])
    shapes = [list(map(size_expression, n.meta["example_value"].shape)) for n in (added, top)]
    assert shapes == [[6, rows], [6]]
    assert where.meta["example_value"].dtype == torch.int64
    assert size == 5 if dynamic is None else size.meta["example_value"].node.expr == rows
    x = torch.randn(5, 4)
    (found, _), expected = run(gm, [added, top], x)
    torch.testing.assert_close(found, expected.T + 2)


def test_no_guard_is_added_by_a_comparison_of_sizes():
    _, linear, emit = make(dynamic=True)
    environment = linear.meta["example_value"].shape[0].node.shape_env
    before = len(environment.guards)

    def compare(x):
        return x.new_ones(3) if x.shape[0] > 2 else x

    node = emit.call(compare, linear)
    assert tuple(node.meta["example_value"].shape) == (3,)
    assert len(environment.guards) == before


def test_a_function_of_no_tensor_takes_the_fake_mode_of_its_neighbour():
    _, linear, emit = make()
    node = emit.call(torch.arange, 7)
    value = node.meta["example_value"]
    assert tuple(value.shape) == (7,)
    assert value.fake_mode is linear.meta["example_value"].fake_mode
    assert evaluate(lambda: 7, (), {}) == 7


def test_nothing_is_recorded_for_gradients():
    _, linear, _ = make()
    fake = linear.meta["example_value"]
    with fake.fake_mode:
        parameter = torch.nn.Parameter(torch.empty(4))
    with torch.enable_grad():
        assert not evaluate(torch.mul, (parameter, 2), {}, like=fake).requires_grad
