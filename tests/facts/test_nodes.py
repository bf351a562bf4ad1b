from __future__ import annotations

import sympy
import torch

from dit_opt.facts.nodes import (
    input_name,
    is_user_input,
    number_of,
    sizes_of,
)
from tests.graphs import capture_one
from zoo import small


def test_owners_of_graph_inputs():
    tiny = small.wan(layers=1)
    gm = capture_one(tiny.model, **tiny.inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    users = [n for n in placeholders if is_user_input(n)]
    assert {*map(input_name, users)} == {"hidden_states", "timestep", "encoder_hidden_states"}
    assert len(placeholders) > len(users)


def test_numbers_and_sizes():
    gm = capture_one(lambda x: x.view(x.shape[0] * 2, -1), torch.randn(4, 6), dynamic=True)
    (view,) = gm.graph.find_nodes(op="call_method", target="view")
    rows = number_of(view.args[1])
    assert rows == sizes_of(view.meta["example_value"])[0] and not rows.is_Integer
    assert number_of(3) == sympy.Integer(3)
    assert number_of(True) is None and number_of("3") is None and number_of(view) is None
