from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_opt.facts.axes import segments
from dit_opt.facts.order_map import OrderMap, OrderReason
from dit_opt.facts.rules import label_axes
from dit_opt.facts.sites import find_sites
from dit_opt.facts.token_axes import TokenAxes
from tests.orders import N, attend, latents, patchify, randn, trace, unpatchify


def orders_of(function, *inputs):
    """The orders by the tokens of the first attention call."""
    gm = trace(function, *inputs)
    labels = label_axes(gm.graph)
    query = find_sites(gm.graph)[0].query
    run = TokenAxes(segments(labels[query][-2])[-1])
    orders = OrderMap(gm.graph, labels, run)
    return orders, {n.name: reason for n, reason in orders.pinned.items()}


def test_begins_at_the_flatten_and_ends_at_the_reshape():
    orders, plain = orders_of(lambda x: unpatchify(attend(patchify(x))), latents())
    assert plain == {"flatten": OrderReason.BEGINS, "reshape": OrderReason.REGROUPS}
    assert orders.find_crossing() is None
    nodes = {n.name: n for n in orders.nodes}
    assert orders.is_entry(nodes["flatten"]) and not orders.is_ordered(nodes["flatten"])
    assert orders.is_ordered(nodes["transpose"]) and not orders.holds(nodes["x"])
    assert orders.undone_inputs(nodes["reshape"]) == [nodes["transpose_1"]]
    assert orders.undone_inputs(nodes["transpose"]) == []


def test_constants_are_alike_in_every_order():
    def model(x):
        tokens = attend(patchify(x))
        ones = torch.ones_like(tokens) + tokens.new_zeros(N)[:, None]
        return unpatchify(attend(tokens * ones)), ones

    _, plain = orders_of(model, latents())
    assert set(plain) == {"flatten", "reshape", "output"}


def test_a_repeated_row_is_alike_in_every_order():
    def model(x, row):
        return unpatchify(attend(patchify(x) + row.expand(1, N, 4)))

    _, plain = orders_of(model, latents(), randn(1, 1, 4))
    assert set(plain) == {"flatten", "reshape"}


def test_values_that_leave_the_graph_are_plain():
    def model(x):
        tokens = attend(patchify(x))
        return unpatchify(attend(tokens)), tokens.tolist()

    orders, plain = orders_of(model, latents())
    assert plain["tolist"] is OrderReason.VALUES
    assert orders.find_crossing() is None


def test_dropout_in_eval_mode_is_no_obstacle():
    def model(x):
        return unpatchify(attend(F.dropout(patchify(x), 0.5, False)))

    _, plain = orders_of(model, latents())
    assert "dropout" not in plain


def test_an_input_without_a_fake_tensor_is_unknown():
    gm = trace(lambda x, y: unpatchify(attend(patchify(x) + 1) * y), latents(), torch.tensor(2.0))
    labels_before = label_axes(gm.graph)
    run = TokenAxes(labels_before[find_sites(gm.graph)[0].query][-2])
    assert run.length == N
    (multiplied,) = (n for n in gm.graph.nodes if n.name == "mul")
    tokens = next(n for n in gm.graph.nodes if n.name == "transpose")
    with gm.graph.inserting_after(tokens):
        hidden = gm.graph.call_function(torch.cumsum, (tokens, 1))
    (add,) = (n for n in gm.graph.nodes if n.name == "add")
    add.args = (tokens, hidden)
    labels = label_axes(gm.graph)
    orders = OrderMap(gm.graph, labels, TokenAxes(labels[find_sites(gm.graph)[0].query][-2]))
    assert orders.pinned[hidden] is OrderReason.VALUES
    assert orders.pinned[add] is OrderReason.UNKNOWN_OP
    assert multiplied not in orders.pinned
