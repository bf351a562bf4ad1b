from __future__ import annotations

import functools
import operator

import pytest
import sympy
import torch

from dit_opt.facts.nodes import is_pointwise, number_of, op_name, origin_of, sizes_of
from dit_opt.facts.rules import RULES
from tests.graphs import capture_one
from zoo import small


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
        (torch.add, "add"),
        (torch.Tensor.add_, "add"),
        (torch.Tensor.split, "split"),
        (torch.functional.split, "split"),
        (torch.linalg.vector_norm, "linalg_vector_norm"),
        (torch.sym_max, "sym_max"),
        (getattr, "getattr"),
    ],
)
def test_one_name_for_every_spelling(target, name):
    assert op_name(node_of(target)) == name


def silu(x):
    return torch.nn.functional.silu(x.cumsum(1))


@functools.wraps(torch.nn.functional.gelu)
def wrapped(x):
    return silu(x)


@functools.wraps(torch.nn.functional.silu)
def wrapped_too(x):
    return silu(x)


scan = torch.library.custom_op(
    "ditopt_test_nodes::silu", silu, mutates_args=(), schema="(Tensor x) -> Tensor"
)


@pytest.mark.parametrize(
    "target",
    [
        silu,
        wrapped,
        wrapped_too,
        torch.ops.ditopt_test_nodes.silu,
        torch.ops.ditopt_test_nodes.silu.default,
        torch.ops.prims.transpose,
        torch.masked.softmax,
        torch.sparse.sum,
    ],
)
def test_what_only_shares_its_name_with_torch_has_another_one(target):
    name = op_name(node_of(target))
    assert name not in RULES and not is_pointwise(name)


def test_pointwise_is_what_torch_says():
    assert is_pointwise("sin") and is_pointwise("add")
    assert not is_pointwise("cumsum") and not is_pointwise("roll") and not is_pointwise("nothing")


def test_owners_of_graph_inputs():
    tiny = small.wan(layers=1)
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
