"""Each trait against the ops themselves: every row of the table is run and must do what it says."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

import dit_opt
from dit_opt.facts import ops
from dit_opt.facts.ops import (
    OPS,
    Trait,
    has,
    is_in_place,
    is_random,
    op_name,
    ops_with,
    reads_shape,
    traits_of,
)
from dit_opt.facts.rules import RULES
from tests.graphs import capture_one


def node_of(target, *args, **kwargs):
    graph = torch.fx.Graph()
    op = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(op, target, (graph.placeholder("x"), *args), kwargs)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, W = randn(2, 6, 4), randn(4, 3)
# No two elements are equal, so that one tells where it came from.
INPUTS = {
    "view_as_complex": randn(2, 6, 2),
    "numpy_T": randn(6, 4),
    "t": randn(6, 4),
    "expand": randn(1, 6, 4),
    "expand_as": randn(1, 6, 4),
    "broadcast_to": randn(1, 6, 4),
    "embedding": randn(6, 4),
    "view_as_real": torch.complex(X, X + 1),
    "real": torch.complex(X, X + 1),
    "imag": torch.complex(X, X + 1),
    "conj": torch.complex(X, X + 1),
    "float": X.double(),
    "conv2d": randn(2, 3, 5, 6),
    "conv3d": randn(2, 3, 4, 5, 6),
    "conv_transpose2d": randn(2, 3, 5, 6),
    "conv_transpose3d": randn(2, 3, 4, 5, 6),
}
SAMPLES = {
    "reshape": lambda x: x.reshape(12, 4),
    "view": lambda x: x.view(3, -1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "ravel": lambda x: x.ravel(),
    "squeeze": lambda x: x.squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "view_as_complex": torch.view_as_complex,
    "view_as_real": torch.view_as_real,
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "movedim": lambda x: x.movedim(0, 2),
    "numpy_T": torch.ops.aten.numpy_T,
    "t": lambda x: x.t(),
    "mT": torch.ops.aten.mT,
    "expand": lambda x: x.expand(3, 6, 4),
    "broadcast_to": lambda x: x.broadcast_to(3, 6, 4),
    "expand_as": lambda x: x.expand_as(torch.zeros(3, 6, 4)),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "tile": lambda x: x.tile((2, 1, 1)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "getitem": lambda x: operator.getitem(x, (slice(None), slice(1, 3))),
    "split": lambda x: x.split(2, 1),
    "chunk": lambda x: x.chunk(3, 1),
    "split_with_sizes": lambda x: x.split_with_sizes([2, 4], 1),
    "tensor_split": lambda x: x.tensor_split(3, 1),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "select": lambda x: x.select(1, 2),
    "unbind": lambda x: x.unbind(1),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "embedding": lambda x: F.embedding(torch.tensor([3, 1]), x),
    "group_norm": lambda x: F.group_norm(x, 2),
    "setitem": lambda x: operator.setitem(x, (slice(None), 1), 0.0),
    "cat": lambda x: torch.cat([x, x + 1], 1),
    "stack": lambda x: torch.stack([x, x + 1]),
    "pad": lambda x: F.pad(x, (0, 0, 1, 2)),
    "pad_sequence": lambda x: pad_sequence([x[0], x[1]]),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "long": lambda x: x.long(),
    "int": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "type": lambda x: x.type(torch.float64),
    "to": lambda x: x.to(torch.bfloat16),
    "type_as": lambda x: x.type_as(torch.ones(1, dtype=torch.float64)),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "alias": torch.ops.aten.alias,
    "cpu": lambda x: x.cpu(),
    # there is no such device here
    "cuda": None,
    "requires_grad": lambda x: x.requires_grad_(False),
    "_get_data_attr": torch._C._autograd._get_data_attr,
    "real": torch.real,
    "imag": torch.imag,
    "conj": torch.conj,
    "positive": torch.positive,
    "getattr": lambda x: getattr(x, "mT"),  # noqa: B009
    "copy": lambda x: torch.ops.aten.copy(torch.zeros_like(x), x),
    "polar": lambda x: torch.polar(x.abs(), x),
    "complex": lambda x: torch.complex(x, x),
    "floor_divide": lambda x: torch.floor_divide(x, 0.1),
    "hardswish": F.hardswish,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "silu": F.silu,
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "threshold": lambda x, **kwargs: F.threshold(x, 0.0, 0.0, **kwargs),
    "rrelu": F.rrelu,
    "dropout": lambda x, **kwargs: F.dropout(x, 0.5, bool(kwargs), **kwargs),
    "alpha_dropout": lambda x, **kwargs: F.alpha_dropout(x, 0.5, bool(kwargs), **kwargs),
    "feature_alpha_dropout": lambda x, **kwargs: F.feature_alpha_dropout(
        x, 0.5, bool(kwargs), **kwargs
    ),
    "dropout1d": lambda x, **kwargs: F.dropout1d(x, 0.5, bool(kwargs), **kwargs),
    "dropout2d": lambda x, **kwargs: F.dropout2d(x[None], 0.5, bool(kwargs), **kwargs)[0],
    "dropout3d": lambda x, **kwargs: F.dropout3d(x[None, None], 0.9, bool(kwargs), **kwargs)[0, 0],
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum(1),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "any": lambda x: x.any(1),
    "all": lambda x: x.all(1),
    "prod": lambda x: x.prod(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "norm": lambda x: torch.norm(x, 2, 1),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    # products with a matrix [4, 3] over the last dimension
    "linear": lambda x, w=W: F.linear(x, w.T),
    "matmul": lambda x, w=W: torch.matmul(x, w),
    "bmm": lambda x, w=W: torch.bmm(x, w.expand(2, 4, 3)),
    "mm": lambda x, w=W: torch.mm(x[0], w),
    "baddbmm": lambda x, w=W: torch.baddbmm(torch.zeros(3), x, w.expand(2, 4, 3)),
    "addmm": lambda x, w=W: torch.addmm(torch.zeros(3), x[0], w),
    "einsum": lambda x, w=W: torch.einsum("bnc,cd->bnd", x, w),
    "scaled_dot_product_attention": lambda x, w=W: F.scaled_dot_product_attention(
        x, w.T.expand(2, 3, 4), randn(2, 3, 5)
    ),
    "conv1d": lambda x: F.conv1d(x, randn(5, 6, 2)),
    "conv2d": lambda x: F.conv2d(x, randn(4, 3, 2, 2)),
    "conv3d": lambda x: F.conv3d(x, randn(4, 3, 2, 2, 2)),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x, randn(6, 5, 2)),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, randn(3, 4, 2, 2)),
    "conv_transpose3d": lambda x: F.conv_transpose3d(x, randn(3, 4, 2, 2, 2)),
    "convolution": lambda x: torch.convolution(
        x, randn(5, 6, 2), None, [1], [0], [1], False, [0], 1
    ),
    "zeros": lambda x: torch.zeros(2, 3),
    "ones": lambda x: torch.ones(2, 3),
    "full": lambda x: torch.full((2, 3), 2.0),
    "empty": lambda x: torch.empty(2, 3),
    "new_zeros": lambda x: x.new_zeros(2, 3),
    "new_ones": lambda x: x.new_ones(2, 3),
    "new_full": lambda x: x.new_full((2, 3), 2.0),
    "new_empty": lambda x: x.new_empty(2, 3),
    "scalar_tensor": lambda x: torch.scalar_tensor(2.0),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda x: torch.full_like(x, 2.0),
    "empty_like": torch.empty_like,
    "arange": lambda x: torch.arange(5),
    "linspace": lambda x: torch.linspace(0, 1, 5),
    "tensor": lambda x: torch.tensor([1.0, 2.0]),
    "rand": lambda x: torch.rand(5),
    "randn": lambda x: torch.randn(5),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "size": lambda x: x.size(),
    "dim": lambda x: x.dim(),
    "ndimension": lambda x: x.ndimension(),
    "numel": lambda x: x.numel(),
    "nelement": lambda x: x.nelement(),
    "stride": lambda x: x.stride(),
    "is_contiguous": lambda x: x.is_contiguous(),
    "is_floating_point": lambda x: x.is_floating_point(),
    "is_complex": lambda x: x.is_complex(),
    "element_size": lambda x: x.element_size(),
    "get_device": lambda x: x.get_device(),
    "sym_size": lambda x: torch.ops.aten.sym_size.int(x, 1),
    "sym_stride": lambda x: torch.ops.aten.sym_stride.int(x, 1),
    "sym_numel": torch.ops.aten.sym_numel,
    "len": len,
}
# Their values are whatever memory held.
UNSET = ("empty", "new_empty", "empty_like")


def input_of(name):
    return INPUTS.get(name, X).clone()


def run(name, x):
    """The value, or the first one of several; what a call that returns none has written."""
    value = SAMPLES[name](x)
    value = x if value is None else value
    return value[0] if isinstance(value, (tuple, list)) and name != "size" else value


def with_trait(trait):
    """A test for each row that has a trait and can be run."""
    names = sorted(n for n in ops_with(trait) if SAMPLES[n] is not None)
    assert names
    return pytest.mark.parametrize("name", names)


def flat(x):
    return (torch.view_as_real(x) if x.is_complex() else x).flatten()


def elements(x):
    return set(flat(x).tolist())


def shares_memory(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def roll(x):
    """Permuted along the dimension that samples act on, across groups and parts."""
    return x.roll(1, 1 if x.dim() > 2 else 0)


class Calls(TorchFunctionMode):
    """Names of the functions that torch is called with."""

    def __init__(self):
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(op_name(node_of(func)))
        return func(*args, **(kwargs or {}))


# called through Python's operators, or out of sight of torch functions
UNSEEN = ("getitem", "setitem", "getattr", "len", "_get_data_attr")


def test_each_op_has_one_row_and_a_sample():
    assert len(OPS) == sum(len(names.split()) for _, names in ops._TABLE)
    assert set(SAMPLES) == set(OPS)
    assert not set(OPS) & set(ops._SPELLINGS)


@pytest.mark.parametrize("name", sorted(n for n in OPS if SAMPLES[n] and n not in UNSEEN))
def test_rows_have_the_names_that_torch_calls_ops_by(name):
    with Calls() as calls:
        SAMPLES[name](input_of(name))
    # a graph shows the method's own name, a call that of the method that it is
    assert {"ndimension": "dim", "nelement": "numel"}.get(name, name) in calls.names


@with_trait(Trait.POINTWISE)
def test_pointwise(name):
    x = input_of(name)
    value = run(name, x)
    assert value.shape == x.shape or name == "scalar_tensor"
    for dim in range(value.dim()):
        torch.testing.assert_close(run(name, x.roll(1, dim)), value.roll(1, dim))


def test_torch_says_what_is_pointwise():
    assert has(node_of(torch.sin), Trait.POINTWISE) and has(node_of("add_", 1), Trait.POINTWISE)
    assert not has(node_of(torch.cumsum, 1), Trait.POINTWISE)
    assert not has(node_of(torch.roll, 1), Trait.POINTWISE)


@with_trait(Trait.CAST)
def test_cast(name):
    x = input_of(name)
    value = run(name, x)
    assert value.dtype != x.dtype and torch.equal(value, x.to(value.dtype))


@with_trait(Trait.COPY)
def test_copy(name):
    x = input_of(name).mT
    value = run(name, x)
    assert torch.equal(value, x) and not shares_memory(value, x)


@with_trait(Trait.RESHAPE)
def test_reshape(name):
    x = input_of(name)
    assert torch.equal(flat(run(name, x)), flat(x))


@with_trait(Trait.PERMUTE)
def test_permute(name):
    x = input_of(name)
    value = run(name, x)
    orders = itertools.permutations(range(x.dim()))
    assert any(torch.equal(value, x.permute(order)) for order in orders)


@with_trait(Trait.REPEAT)
def test_repeat(name):
    x = input_of(name)
    value = run(name, x)
    assert value.numel() > x.numel() and elements(value) == elements(x)


@with_trait(Trait.SLICE)
def test_slice(name):
    x = input_of(name)
    value = run(name, x)
    assert value.dim() == x.dim()
    assert any(
        torch.equal(value, x.narrow(dim, start, value.shape[dim]))
        for dim in range(x.dim())
        for start in range(x.shape[dim] - value.shape[dim] + 1)
    )


@with_trait(Trait.JOIN)
def test_join(name):
    x = input_of(name)
    value = run(name, x)
    assert value.numel() >= x.numel() and elements(value) >= elements(x)


@with_trait(Trait.POSITIONAL)
def test_positional(name):
    x = input_of(name)
    assert elements(run(name, roll(x))) != elements(run(name, x.clone()))


@with_trait(Trait.REDUCE)
def test_reduce(name):
    x = input_of(name)
    value = run(name, x)
    assert value.numel() < x.numel()
    torch.testing.assert_close(run(name, roll(x)), value)


@with_trait(Trait.CONTRACT)
def test_contract(name):
    order = torch.tensor([2, 0, 3, 1])
    value = SAMPLES[name](X, W)
    torch.testing.assert_close(SAMPLES[name](X[..., order], W[order]), value)
    assert not torch.allclose(SAMPLES[name](X[..., order], W), value)


@with_trait(Trait.CONVOLVE)
def test_convolve(name):
    x = input_of(name)
    # one less at the end where a transposed convolution would add what is cut off
    value, moved = run(name, x)[..., 2:], run(name, x[..., 1:])[..., 1:]
    torch.testing.assert_close(moved, value)


@with_trait(Trait.LINEAR)
def test_linear(name):
    x = input_of(name)
    y = x.flip(-1) + 1
    torch.testing.assert_close(run(name, x + y), run(name, x) + run(name, y))


@with_trait(Trait.KEEPS_SHAPE)
def test_keeps_shape(name):
    x = input_of(name)
    assert run(name, x).shape == x.shape


@with_trait(Trait.KEEPS_LAYOUT)
def test_keeps_layout(name):
    x = input_of(name).mT
    assert run(name, x).stride() == x.stride()


@with_trait(Trait.ALIAS)
def test_alias(name):
    x = input_of(name)
    x = run(name, x) if traits_of(name) & Trait.CAST else x
    assert shares_memory(run(name, x), x)


@pytest.mark.parametrize("name", sorted(n for n in OPS if SAMPLES[n] is not None))
def test_no_other_row_aliases_its_input_or_writes_to_it(name):
    x = input_of(name)
    value = run(name, x)
    writes = not torch.equal(x, input_of(name))
    assert writes == bool(traits_of(name) & Trait.IN_PLACE)
    if isinstance(value, torch.Tensor) and not traits_of(name) & (Trait.ALIAS | Trait.IN_PLACE):
        assert not shares_memory(value, x)


@with_trait(Trait.IN_PLACE)
def test_in_place(name):
    x = input_of(name)
    run(name, x)
    assert not torch.equal(x, input_of(name))


@with_trait(Trait.INPLACE_FLAG)
def test_inplace_flag(name):
    x = input_of(name)
    SAMPLES[name](x, inplace=True)
    assert not torch.equal(x, input_of(name))


def test_every_function_of_torch_with_the_flag_has_the_trait():
    functions = {n: f for n, f in vars(F).items() if inspect.isfunction(f) and n[0] != "_"}
    flagged = {n for n, f in functions.items() if "inplace" in inspect.signature(f).parameters}
    assert flagged <= ops_with(Trait.INPLACE_FLAG)


@with_trait(Trait.LIKENESS)
def test_likeness(name):
    method = getattr(torch.Tensor, name)
    one, other = (torch.full((3, 6, 4), number, dtype=torch.half) for number in (0.0, 1.0))
    assert torch.equal(method(X[:1], one), method(X[:1], other))


@with_trait(Trait.CREATES)
def test_creates(name):
    values = []
    for x in (input_of(name), input_of(name) + 1):
        torch.manual_seed(0)
        values.append(run(name, x))
    assert values[0].shape == values[1].shape
    assert name in UNSET or torch.equal(*values)


@with_trait(Trait.UNIFORM)
def test_uniform(name):
    if name not in UNSET:
        assert len(elements(run(name, input_of(name)))) == 1


@with_trait(Trait.READS_SHAPE)
def test_reads_shape(name):
    x = input_of(name)
    value = run(name, x)
    assert not isinstance(value, torch.Tensor) and value == run(name, x + 1)
    if name != "get_device":
        # it has no elements that could be read
        assert value == run(name, x.to("meta"))


def test_attributes_that_read_the_shape():
    assert all(reads_shape(node_of(getattr, name)) for name in ("shape", "dtype", "device"))
    assert reads_shape(node_of("size")) and not reads_shape(node_of(getattr, "mT"))


@pytest.mark.parametrize("name", sorted(n for n in OPS if SAMPLES[n] and n not in UNSET))
def test_random(name):
    x = input_of(name)
    one, other = run(name, x.clone()), run(name, x.clone())
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    # dropout is random too, but not in the samples
    assert same or traits_of(name) & Trait.RANDOM
    assert not same or name not in ("rand", "randn", "rand_like", "randn_like")


def test_calls_that_are_random():
    assert all(is_random(node_of(n)) for n in ("bernoulli", "normal_", "uniform_", "multinomial"))
    assert is_random(node_of(F.dropout, 0.5)) and is_random(node_of(torch.dropout, 0.5, True))
    assert not is_random(node_of(F.dropout, 0.5, False)) and not is_random(node_of(F.dropout, 0.0))
    assert not is_random(node_of(torch.dropout, 0.5, train=False))
    assert not is_random(node_of(torch.sin))
    attention = F.scaled_dot_product_attention
    assert is_random(node_of(attention, X, X, dropout_p=0.1)) and not is_random(node_of(attention))


def test_calls_that_write():
    for target in ("add_", operator.iadd, operator.setitem, torch.relu_, "__iadd__"):
        assert is_in_place(node_of(target, 1)) == (target != "__iadd__")
    assert is_in_place(node_of(F.silu, inplace=True)) and is_in_place(node_of(F.silu, True))
    assert not any(is_in_place(node_of(n)) for n in ("requires_grad_", "__and__", "add", F.silu))
    assert not is_in_place(node_of(operator.and_)) and not is_in_place(node_of(operator.not_))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("masked_fill_", "masked_fill"),
        ("view", "view"),
        (operator.and_, "bitwise_and"),
        (operator.xor, "bitwise_xor"),
        (operator.not_, "not"),
        (operator.iadd, "add"),
        (operator.truediv, "div"),
        (torch.concat, "cat"),
        ("swapdims", "transpose"),
        (operator.__getitem__, "getitem"),
        (torch.ops.aten.add.Tensor, "add"),
        (torch.nn.functional.scaled_dot_product_attention, "scaled_dot_product_attention"),
        ("__and__", "bitwise_and"),
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
    assert name not in RULES and not traits_of(name)


SPELLED = {
    "bitwise_not": (torch.tensor([1, 6]),),
    "neg": (X,),
    "positive": (X,),
    "clamp": (X, 0.0),
    "cat": ([X, X + 1],),
    "transpose": (X, 0, 1),
    "movedim": (X, 0, 1),
    "matmul": (X, W),
    "threshold": (X, 0.0, 1.0),
    "linalg_vector_norm": (X,),
}


@pytest.mark.parametrize("spelling", ops._SPELLINGS)
def test_spellings_do_the_same(spelling):
    name = ops._SPELLINGS[spelling]
    integers = torch.tensor([[1, 6]]), torch.tensor([[3, 2]])
    floats = X.abs() + 1, X.abs() + 2
    args = SPELLED.get(name, integers if name.startswith("bitwise") else floats)
    homes = (torch, operator, torch.Tensor, torch.linalg, F)
    spelled = next(getattr(home, spelling) for home in homes if hasattr(home, spelling))
    copied = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    wanted = getattr(torch.ops.aten, name)(*args)
    torch.testing.assert_close(spelled(*copied), wanted)


def test_graphs_of_dynamo_have_these_names():
    def function(x):
        y = x / 2
        y *= x[:, 1:2]
        return torch.concat([y & y if not y.is_floating_point() else y, x.swapaxes(0, 1).mT], -1)

    gm = capture_one(function, randn(4, 4))
    names = [op_name(n) for n in gm.graph.nodes]
    assert names == [
        "placeholder", "div", "getitem", "mul", "transpose", "getattr", "cat", "output",
    ]  # fmt: skip


def strings_of(value):
    """The strings of a literal: a set, a tuple, a dict's keys, or one string that is split."""
    if isinstance(value, ast.Call):
        inner = [value.func.value] if isinstance(value.func, ast.Attribute) else value.args
        return strings_of(inner[0]) if len(inner) == 1 else []
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value.split()
    items = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
    return [i.value if isinstance(i, ast.Constant) else i for i in items]


def lists_ops(source):
    """The module-level names that are bound to three or more names of ops."""
    found = []
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            target = ast.unparse(getattr(statement, "target", None) or statement.targets[0])
            strings = strings_of(statement.value)
            is_rules = target.endswith("RULES")
            if len(strings) > 2 and not is_rules and all(s in OPS for s in strings):
                found.append(target)
    return found


def test_only_the_table_lists_ops():
    assert lists_ops('A = ("to", "float", "half")\nB: set = {"to", "x", "y"}') == ["A"]
    assert lists_ops('A = set("to float half".split())\nB = frozenset({"sum", "mean", "var"})') == [
        "A",
        "B",
    ]
    root = Path(dit_opt.__file__).parent
    found = {
        str(path.relative_to(root)): names
        for path in root.rglob("*.py")
        if path != Path(ops.__file__) and (names := lists_ops(path.read_text(encoding="utf-8")))
    }
    assert found == {}
