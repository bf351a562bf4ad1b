from __future__ import annotations

import operator

import pytest
import sympy
import torch

from dit_opt.facts.nodes import is_pointwise, number_of, op_name, origin_of, sizes_of
from tests import tiny_models
from tests.graphs import capture_one


def node_of(target):
    graph = torch.fx.Graph()
    op = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(op, target)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("masked_fill_", "masked_fill"),
        ("view", "view"),
        (operator.and_, "and_"),
        (operator.__getitem__, "getitem"),
        (torch.ops.aten.add.Tensor, "add"),
        (torch.nn.functional.scaled_dot_product_attention, "scaled_dot_product_attention"),
        ("__and__", "__and__"),
    ],
)
def test_one_name_for_every_spelling(target, name):
    assert op_name(node_of(target)) == name


def test_pointwise_is_what_torch_says():
    assert is_pointwise("sin") and is_pointwise("add")
    assert not is_pointwise("cumsum") and not is_pointwise("roll") and not is_pointwise("nothing")


def test_owners_of_graph_inputs():
    tiny = tiny_models.wan(layers=1)
    gm = capture_one(tiny.model, **tiny.inputs)
    owners = [origin_of(n) for n in gm.graph.find_nodes(op="placeholder")]
    users = {name for name, user in owners if user}
    assert users == {"hidden_states", "timestep", "encoder_hidden_states"}
    assert len(owners) > len(users)


def test_numbers_and_sizes():
    gm = capture_one(lambda x: x.view(x.shape[0] * 2, -1), torch.randn(4, 6), dynamic=True)
    (view,) = gm.graph.find_nodes(op="call_method", target="view")
    rows = number_of(view.args[1])
    assert rows == sizes_of(view.meta["example_value"])[0] and not rows.is_Integer
    assert number_of(3) == sympy.Integer(3)
    assert number_of(True) is None and number_of("3") is None and number_of(view) is None
