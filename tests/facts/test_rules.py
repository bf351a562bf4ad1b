"""Each rule against the op itself: permute an axis wherever a label has it, run, compare.

This is the argument that labels are sound: a leaf that the rules let pass may be permuted in all
inputs that hold it, and the result is the plain one with the same leaf permuted.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dit_opt.facts.axes import leaves, resolve, segments, size
from dit_opt.facts.rules import RULES, label_axes
from tests.graphs import capture_one


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def order_of(dim, leaf, permutation):
    """The permutation of a dimension that a permutation of one of its leaves makes."""
    order = torch.arange(int(size(resolve(dim))))
    outer = 1
    for axis in resolve(dim):
        inner = torch.arange(int(axis.size))
        if axis is leaf:
            inner = permutation
        elif axis.is_sum:
            parts = segments((axis,))
            starts = [sum(int(size(p)) for p in parts[:i]) for i in range(len(parts))]
            inner = torch.cat(
                [order_of(p, leaf, permutation) + s for p, s in zip(parts, starts, strict=True)]
            )
        order = order.view(outer, int(axis.size), -1)[:, inner].reshape(-1)
        outer *= int(axis.size)
    return order


def permute(value, label, leaf, permutation):
    for d, dim in enumerate(label):
        value = value.index_select(d, order_of(dim, leaf, permutation))
    return value


class Recorder(torch.fx.Interpreter):
    """Writes real values where Dynamo writes fake ones; much faster than a capture by Dynamo."""

    def run_node(self, n):
        n.meta["example_value"] = value = super().run_node(n)
        return value


ARITY = {
    1: lambda f: lambda a: f(a),
    2: lambda f: lambda a, b: f(a, b),
    3: lambda f: lambda a, b, c: f(a, b, c),
    4: lambda f: lambda a, b, c, d: f(a, b, c, d),
}


def trace(function, *inputs):
    gm = torch.fx.symbolic_trace(ARITY[len(inputs)](function))
    Recorder(gm).run(*(x.clone() for x in inputs))
    return gm


def outputs_of(gm):
    (value,) = next(iter(gm.graph.find_nodes(op="output"))).args
    return value if isinstance(value, (tuple, list)) else (value,)


def check(gm, *inputs):
    """Checks every leaf that the rules let pass.

    Returns ({"input.dimension": leaf, ...}, with a number more where a dimension has several, and
    the leaves of each output).
    """
    labels = label_axes(gm.graph)
    nodes = gm.graph.find_nodes(op="placeholder")
    plain = as_tuple(gm(*(x.clone() for x in inputs)))
    passed = {}
    for number, node in enumerate(nodes):
        for d, dim in enumerate(labels[node]):
            for k, leaf in enumerate(leaves(dim)):
                if leaf not in labels.ended:
                    passed[f"{number}.{d}" + (f".{k}" if len(leaves(dim)) > 1 else "")] = leaf
    results = [r for n in outputs_of(gm) for r in flatten(labels.label_of(n))]
    for leaf in set(passed.values()):
        generator = torch.Generator().manual_seed(int(leaf.size))
        permutation = torch.randperm(int(leaf.size), generator=generator)
        moved = [
            permute(x, labels[n], leaf, permutation) for x, n in zip(inputs, nodes, strict=True)
        ]
        for label, actual, wanted in zip(results, as_tuple(gm(*moved)), plain, strict=True):
            torch.testing.assert_close(
                actual, permute(wanted, label, leaf, permutation), rtol=1e-5, atol=1e-5
            )
    return passed, [[leaf for dim in label for leaf in leaves(dim)] for label in results]


def as_tuple(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def flatten(label):
    return list(label) if isinstance(label, tuple) else [label]


# name: (function, inputs, the input dimensions whose axes must reach the result)
X = randn(2, 6, 4)
CASES = {
    "add": (torch.add, (X, randn(6, 4)), "0.0 0.1 0.2 1.0 1.1"),
    "operators": (lambda x, y: -x * y / 2 + (x > y), (X, X.flip(0)), "0.0 0.1 0.2"),
    "in place": (lambda x, y: x.clone().mul_(2).add_(y), (X, X + 1), "0.0 0.1 1.2"),
    "copy": (lambda x, y: torch.empty_like(x).copy_(y), (X, X + 1), "0.1 1.1"),
    "where": (lambda x, y: torch.where(x > 0, x, y), (X, randn(4)), "0.1 0.2 1.0"),
    "mask": (lambda x, y: x.masked_fill(y > 0, -1.0), (X, randn(6, 1)), "0.0 0.1 1.0"),
    "casts": (lambda x: x.double().to(torch.float32).contiguous(), (X,), "0.0 0.1 0.2"),
    "softmax": (lambda x: x.softmax(-1), (X,), "0.0 0.1 0.2"),
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, (4,), w, b),
        (X, randn(4), randn(4) + 1),
        "0.0 0.1 0.2 1.0 2.0",
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), (X, randn(4)), "0.0 0.1 0.2 1.0"),
    "group_norm": (
        lambda x, w: F.group_norm(x, 2, w),
        (randn(2, 4, 6), randn(4)),
        "0.0 0.2",
    ),
    "mean": (lambda x: x.mean(1), (X,), "0.0 0.2"),
    "sum": (lambda x: x.sum((0, -1), keepdim=True), (X,), "0.1"),
    "norm": (lambda x: torch.norm(x, 2, -1), (X,), "0.0 0.1"),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (X,), "0.0 0.2"),
    "amax": (lambda x: x.amax(dim=-1, keepdim=True), (X,), "0.0 0.1"),
    "max": (lambda x: x / x.max(), (X,), "0.0 0.1 0.2"),
    "flatten": (lambda x: x.flatten(1), (X,), "0.0 0.1 0.2"),
    "reshape": (lambda x: x.reshape(2, 2, 3, 4), (X,), "0.0 0.1.0 0.1.1 0.2"),
    "regroup": (lambda x: x.reshape(12, 4).view(2, 3, 8), (X,), "0.0 0.1.0 0.2"),
    "unflatten": (lambda x: x.unflatten(2, (2, -1)), (X,), "0.0 0.1 0.2.0 0.2.1"),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1)[None], (X,), "0.0 0.1 0.2"),
    "transpose": (lambda x: x.transpose(0, 2).mT, (X,), "0.0 0.1 0.2"),
    "permute": (lambda x: x.permute(2, 0, 1).permute((1, 0, 2)), (X,), "0.0 0.1 0.2"),
    "movedim": (lambda x: x.movedim(0, -1).movedim((0, 1), (1, 2)), (X,), "0.0 0.1 0.2"),
    "t": (lambda x: x.t() + x.T, (randn(3, 5),), "0.0 0.1"),
    "expand": (lambda x: x[:, None].expand(2, 3, 6, 4), (X,), "0.0 0.1 0.2"),
    "repeat": (lambda x: x.repeat(2, 1, 3), (X,), "0.0 0.1 0.2"),
    "interleave": (lambda x: x.repeat_interleave(2, dim=1), (X,), "0.0 0.1 0.2"),
    "meshgrid": (
        lambda x, y: torch.meshgrid(x, y, indexing="ij")[1].flatten(),
        (randn(3), randn(4)),
        "0.0 1.0",
    ),
    "meshgrid xy": (
        lambda x, y: torch.meshgrid([x, y], indexing="xy")[0] * 2,
        (randn(3), randn(4)),
        "0.0 1.0",
    ),
    "complex": (
        lambda x, y: torch.view_as_real(torch.view_as_complex(x.reshape(2, 6, 2, 2)) * y),
        (X, torch.polar(randn(6, 2).abs(), randn(6, 2))),
        "0.0 0.1 1.0",
    ),
    "cat": (lambda x, y: torch.cat([x, y], 1), (X, randn(2, 3, 4)), "0.0 0.1 0.2 1.1"),
    "cat and slice": (
        lambda x, y: torch.cat([x, y], dim=1)[:, 6:] * 2,
        (X, randn(2, 3, 4)),
        "0.0 1.1 1.2",
    ),
    "stack": (lambda x, y: torch.stack([x, y], -1).flatten(2), (X, X + 1), "0.0 0.1 0.2"),
    "rows": (
        lambda x, y: pad_sequence([x, y], batch_first=True),
        (randn(6, 4), randn(6, 4) + 1),
        "0.0 0.1 1.0",
    ),
    "ragged rows": (
        lambda x, y: pad_sequence([torch.cat([x, y]), x * 2], padding_value=1.0),
        (randn(6, 4), randn(3, 4)),
        "0.0 0.1 1.1",
    ),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 2)), (X,), "0.0 0.1 0.2"),
    "split": (lambda x: x.split([1, 3], -1), (X,), "0.0 0.1"),
    "chunk": (lambda x: x.chunk(2, dim=-1)[1], (X,), "0.0 0.1"),
    "unbind": (lambda x: x.unbind(1)[2], (X,), "0.0 0.2"),
    "select": (lambda x: x[:, 3] + x.select(1, 2), (X,), "0.0 0.2"),
    "narrow": (lambda x: x.narrow(1, 2, 3), (X,), "0.0 0.2"),
    "steps": (lambda x: x[..., 0::2], (X,), "0.0 0.1"),
    "outer part": (lambda x: x.flatten(1)[:, 4:12], (X,), "0.0 0.2"),
    "ids": (lambda x, i: x[:, i], (X, torch.tensor([3, 1, 1, 0])), "0.0 0.2 1.0"),
    "index_select": (
        lambda x, i: x.index_select(1, i),
        (X, torch.tensor([3, 1, 1, 0])),
        "0.0 0.2 1.0",
    ),
    "rotary writes": (
        lambda x, y: _interleave(x, y),
        (X, randn(6, 2)),
        "0.0 0.1 1.0",
    ),
    "written segments": (
        lambda x, y: _write(x, y),
        (X, randn(2, 3, 4)),
        "0.0 0.1.0 0.1.1 0.2 1.1",
    ),
    "linear": (F.linear, (X, randn(5, 4), randn(5)), "0.0 0.1 1.0 2.0"),
    "matmul": (lambda x, y: x @ y, (randn(3, 2, 6, 4), randn(2, 4, 5)), "0.0 0.1 0.2 1.0 1.2"),
    "vectors": (lambda x, y, z: z @ (x @ y), (X, randn(4), randn(2)), "0.1"),
    "bmm": (lambda x, y: torch.bmm(x, y), (X, randn(2, 4, 3)), "0.0 0.1 1.2"),
    "baddbmm": (
        lambda b, x, y: torch.baddbmm(b, x, y, beta=1, alpha=0.5),
        (randn(2, 6, 3), X, randn(2, 4, 3)),
        "0.0 0.1 0.2 1.1 2.2",
    ),
    "addmm": (torch.addmm, (randn(3), randn(6, 4), randn(4, 3)), "0.0 1.0 2.1"),
    "einsum": (
        lambda x, y: torch.einsum("bnc,ncd->bdn", x, y),
        (X, randn(6, 4, 3)),
        "0.0 0.1 1.2",
    ),
    "outer": (torch.outer, (randn(3), randn(4)), "0.0 1.0"),
    "embedding": (F.embedding, (torch.tensor([[3, 1, 0]]), randn(5, 4)), "0.1 1.1"),
    "attention": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        (randn(1, 2, 6, 4), randn(1, 2, 5, 4), randn(1, 2, 5, 3), randn(1, 1, 1, 5)),
        "0.1 0.2 2.3",
    ),
    "grouped attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (randn(1, 4, 6, 8), randn(1, 2, 6, 8)),
        "0.2",
    ),
    "causal attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        (randn(1, 2, 6, 4),),
        "0.1",
    ),
    "patches": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2).flatten(2),
        (randn(2, 3, 4, 6), randn(5, 3, 2, 2), randn(5)),
        "0.0 0.2.0 0.3.0 1.0 2.0",
    ),
    "patches of video": (
        lambda x, w: F.conv3d(x, w, stride=(1, 2, 2)).flatten(2).transpose(1, 2),
        (randn(1, 3, 2, 4, 6), randn(5, 3, 1, 2, 2)),
        "0.2 0.3.0 0.4.0 1.0",
    ),
    "pointwise convolution": (F.conv1d, (X, randn(5, 6, 1)), "0.0 0.2 1.0"),
    "mixing convolution": (
        lambda x, w: F.conv1d(x, w, padding=1),
        (X, randn(5, 6, 3)),
        "0.0 1.0",
    ),
    "grouped convolution": (
        lambda x, w: F.conv1d(x, w, groups=2),
        (X, randn(4, 3, 1)),
        "0.0 0.2",
    ),
}  # fmt: skip


def _interleave(x, y):
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2] * y
    out[..., 1::2] = x[..., 0::2] + y
    return out


def _write(x, y):
    x = x.clone()
    x[:, 2:5] = y
    return x * 2


# Dynamo alone can trace an assignment to a slice.
BY_DYNAMO = ("rotary writes", "written segments")


@pytest.mark.parametrize("name", CASES)
def test_permuting_an_axis_commutes_with_the_op(name):
    function, inputs, wanted = CASES[name]
    gm = (capture_one if name in BY_DYNAMO else trace)(function, *inputs)
    passed, outputs = check(gm, *inputs)
    for place in wanted.split():
        assert place in passed, f"the axis {place} ends"
        assert all(passed[place] in found for found in outputs), f"the axis {place} is lost"


ENDS = {
    "roll": (lambda x: x.roll(1, 1), {"0.0", "0.1", "0.2"}),
    "cumsum": (lambda x: x.cumsum(1), {"0.0", "0.1", "0.2"}),
    "select": (lambda x: x[:, 2], {"0.1"}),
    "part": (lambda x: x[:, :3], {"0.1"}),
    "steps": (lambda x: x[:, ::2], {"0.1"}),
    "ragged": (lambda x: pad_sequence([x[0], x[1, :3]]), {"0.1"}),
    "rows from the right": (
        lambda x: pad_sequence([x[0], x[1]], padding_side="left"),
        {"0.1", "0.2"},
    ),
    "gather": (lambda x: x[:, torch.tensor([0, 2, 1])], {"0.1"}),
    "repeat by data": (lambda x: x.repeat_interleave(torch.tensor([2, 1]), dim=0), {"0.0"}),
    "causal": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), {"0.1"}),
    "convolution": (lambda x: F.conv1d(x, torch.ones(2, 6, 3), padding=1), {"0.2"}),
    "reshape across": (lambda x: x.reshape(3, 4, 4), {"0.0", "0.1"}),
}


@pytest.mark.parametrize("name", ENDS)
def test_ops_that_read_positions_end_the_axis(name):
    function, wanted = ENDS[name]
    passed, _ = check(trace(function, X), X)
    assert not wanted & set(passed)


def test_a_rule_of_wrong_sizes_is_no_rule(monkeypatch):
    monkeypatch.setitem(RULES, "flatten", lambda labels, x, *_: labels[x])
    gm = trace(lambda x: x.flatten(1) * 2, X)
    labels = label_axes(gm.graph)
    (source,) = gm.graph.find_nodes(op="placeholder")
    assert all(leaf in labels.ended for dim in labels[source] for leaf in leaves(dim))


@pytest.mark.parametrize(
    "function",
    # zip of sizes that differ; a remainder by no dimensions
    [lambda x: torch.einsum("bnc,bnd->bcd", [x]), lambda x: x.sum((0, 1, 2)).sum(0)],
    ids=["ValueError", "ZeroDivisionError"],
)
def test_a_rule_that_fails_in_any_way_is_no_rule(function):
    gm = torch.fx.symbolic_trace(function)
    for node in gm.graph.nodes:
        node.meta["example_value"] = X if node.op == "placeholder" else torch.tensor(0.0)
    labels = label_axes(gm.graph)
    (node,) = labels.unknown
    assert node.name in ("einsum", "sum_2")


def silu(x):
    return x.cumsum(1)


torch.fx.wrap("silu")


def test_a_function_with_the_name_of_an_op_of_torch_has_no_rule():
    gm = trace(lambda x: silu(x) * 2, X)
    passed, _ = check(gm, X)
    assert not passed
    (reason,) = label_axes(gm.graph).unknown.values()
    assert reason == "tests.facts.test_rules.silu has no rule"


def test_two_structures_of_one_axis_are_disputed():
    def clash(x, h, w):
        return x + (h[:, None] + w).flatten() + (w[:, None] + h).flatten()

    gm = trace(clash, randn(20), torch.arange(4.0), torch.arange(5.0))
    labels = label_axes(gm.graph)
    outputs = outputs_of(gm)
    found = set(leaves(labels[outputs[0]][0]))
    # permuting one axis of the result would not permute both tables alike
    assert found <= labels.disputed and found <= set(labels.ended)


def test_a_number_written_at_a_position_ends_the_axis():
    def write(x):
        x = x.clone()
        x[:, 2] = 0.0
        return x * 2

    passed, _ = check(capture_one(write, X), X)
    assert "0.1" not in passed and {"0.0", "0.2"} <= set(passed)


def test_labels_tell_what_each_node_ends_makes_and_does_not_know():
    gm = trace(lambda x: torch.stack([x.cumsum(1), x], -1)[:, 2], X)
    labels = label_axes(gm.graph)
    nodes = {n.name: n for n in gm.graph.nodes}
    assert labels.unknown == {nodes["cumsum"]: "cumsum has no rule"}
    assert set(labels.ends) == {nodes["cumsum"], nodes["getitem"]}
    assert labels.ends[nodes["getitem"]] == [labels[nodes["stack"]][1]]
    assert labels.makes[nodes["stack"]] == [labels[nodes["stack"]][3]]


def test_labelling_sees_what_later_ops_tie():
    """The slice comes before the buffer is known to be a concatenation."""

    def late(x, y, z):
        early = x[:, 2:]
        return early * 2, x + torch.cat([y, z], 1)

    gm = trace(late, X, randn(2, 2, 4), randn(2, 4, 4))
    labels = label_axes(gm.graph)
    outputs = outputs_of(gm)
    z = gm.graph.find_nodes(op="placeholder")[-1]
    assert math.prod(int(a.size) for a in leaves(labels[outputs[0]][1])) == 4
    assert leaves(labels[outputs[0]][1]) == leaves(labels[z][1])
