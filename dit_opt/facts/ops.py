"""Ops: the public name of the op of a node, and what is true of it wherever it is called.

`OPS` is the one table of op properties; passes and facts ask `has(node, Trait.CAST)` or
`ops_with(Trait.CAST)` and keep no lists of their own. Torch's tags say which ops are elementwise or
random, so those need no row.
"""

from __future__ import annotations

from enum import Flag, auto
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

from dit_opt._compat import operator_name


class Trait(Flag):
    """What an op does to its tensors; "input" is the first argument."""

    # Each element of the value is made from the elements at its place; operands broadcast.
    POINTWISE = auto()
    # Gives the input another dtype; the value has its shape and strides.
    CAST = auto()
    # Copies the input; `contiguous` only where that is needed.
    COPY = auto()
    # Regroups dimensions row-major: elements keep their order.
    RESHAPE = auto()
    # Reorders dimensions.
    PERMUTE = auto()
    # Repeats the input along a dimension.
    REPEAT = auto()
    # Takes ranges of a dimension.
    SLICE = auto()
    # Concatenates tensors, or one with constants.
    JOIN = auto()
    # Reads or writes elements by their index.
    POSITIONAL = auto()
    # Reduces dimensions to one value that does not depend on the order of their elements.
    REDUCE = auto()
    # Sums products over dimensions that operands share.
    CONTRACT = auto()
    CONVOLVE = auto()
    # A product with a matrix or kernel, which may be a weight.
    LINEAR = auto()
    # The value has the dimensions of the input, in their order.
    KEEPS_SHAPE = auto()
    # The value of an input without gaps has its strides.
    KEEPS_LAYOUT = auto()
    # The value may share memory with the input.
    ALIAS = auto()
    # Every call writes to the input.
    IN_PLACE = auto()
    # Writes to the input if `inplace=True`.
    INPLACE_FLAG = auto()
    # Of the second argument only the shape or the dtype is read.
    LIKENESS = auto()
    # Reads no element of any tensor: the value is a tensor made anew.
    CREATES = auto()
    # All elements are one number, or not set yet.
    UNIFORM = auto()
    # Reads no element of any tensor: the value is a number, a shape or a flag.
    READS_SHAPE = auto()
    # Two calls with the same arguments may differ.
    RANDOM = auto()


_TABLE: tuple[tuple[Trait, str], ...] = (
    # dimensions
    (
        Trait.RESHAPE | Trait.ALIAS,
        "reshape view flatten unflatten ravel squeeze unsqueeze view_as_complex view_as_real",
    ),
    (Trait.PERMUTE | Trait.ALIAS, "permute transpose movedim numpy_T t mT"),
    (Trait.REPEAT | Trait.ALIAS, "expand broadcast_to"),
    (Trait.REPEAT | Trait.ALIAS | Trait.LIKENESS, "expand_as"),
    (Trait.REPEAT, "repeat tile repeat_interleave"),
    # parts of tensors
    (
        Trait.SLICE | Trait.POSITIONAL | Trait.ALIAS,
        "getitem split chunk split_with_sizes tensor_split narrow",
    ),
    (Trait.POSITIONAL | Trait.ALIAS, "select unbind"),
    (Trait.POSITIONAL, "index_select embedding group_norm"),
    (Trait.POSITIONAL | Trait.IN_PLACE, "setitem"),
    (Trait.JOIN, "cat stack pad pad_sequence"),
    # the same elements
    (
        Trait.CAST | Trait.KEEPS_SHAPE | Trait.KEEPS_LAYOUT | Trait.ALIAS,
        "float double half bfloat16 long int bool type",
    ),
    (
        Trait.CAST | Trait.KEEPS_SHAPE | Trait.KEEPS_LAYOUT | Trait.ALIAS | Trait.LIKENESS,
        "to type_as",
    ),
    (Trait.COPY | Trait.KEEPS_SHAPE | Trait.ALIAS, "contiguous"),
    (Trait.COPY | Trait.KEEPS_SHAPE | Trait.KEEPS_LAYOUT, "clone"),
    (Trait.KEEPS_SHAPE | Trait.KEEPS_LAYOUT | Trait.ALIAS, "detach alias"),
    (
        Trait.KEEPS_SHAPE | Trait.ALIAS,
        "cpu cuda requires_grad _get_data_attr real imag conj positive",
    ),
    (Trait.ALIAS, "getattr"),
    # elementwise, where torch has no tag
    (Trait.POINTWISE, "copy polar complex floor_divide"),
    (Trait.POINTWISE | Trait.INPLACE_FLAG, "hardswish"),
    (
        Trait.INPLACE_FLAG,
        "relu relu6 leaky_relu elu selu celu silu mish hardsigmoid hardtanh threshold rrelu",
    ),
    (Trait.INPLACE_FLAG | Trait.KEEPS_SHAPE | Trait.ALIAS, "dropout"),
    (
        Trait.INPLACE_FLAG | Trait.ALIAS | Trait.RANDOM,
        "alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d",
    ),
    (Trait.KEEPS_SHAPE, "softmax log_softmax"),
    # sums
    (
        Trait.REDUCE,
        "mean sum var std amax amin max min any all prod logsumexp norm linalg_vector_norm",
    ),
    (Trait.CONTRACT | Trait.LINEAR, "linear matmul bmm mm baddbmm addmm"),
    (Trait.CONTRACT, "einsum scaled_dot_product_attention"),
    (
        Trait.CONVOLVE | Trait.LINEAR,
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
    ),
    # no elements are read
    (
        Trait.CREATES | Trait.UNIFORM,
        "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor",
    ),
    (
        Trait.CREATES | Trait.UNIFORM | Trait.KEEPS_SHAPE,
        "zeros_like ones_like full_like empty_like",
    ),
    (Trait.CREATES, "arange linspace tensor rand randn"),
    (Trait.CREATES | Trait.KEEPS_SHAPE, "rand_like randn_like"),
    (
        Trait.READS_SHAPE,
        "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex "
        "element_size get_device sym_size sym_stride sym_numel len",
    ),
)
OPS: dict[str, Trait] = {name: traits for traits, names in _TABLE for name in names.split()}

# Spellings that write to the input, and the op that they do.
_IN_PLACE = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floor_divide",
    "imod": "remainder",
    "ipow": "pow",
    "iand": "bitwise_and",
    "ior": "bitwise_or",
    "ixor": "bitwise_xor",
    "ilshift": "bitwise_left_shift",
    "irshift": "bitwise_right_shift",
    "imatmul": "matmul",
}
_SPELLINGS = {
    **_IN_PLACE,
    "subtract": "sub",
    "multiply": "mul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "negative": "neg",
    "pos": "positive",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "__invert__": "bitwise_not",
    "__matmul__": "matmul",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "vector_norm": "linalg_vector_norm",
    "_threshold": "threshold",
}
# They end in an underscore and write nothing.
_PURE = ("and_", "or_", "not_", "requires_grad_")
# Attributes of a tensor that do not depend on its elements.
_SHAPE_ATTRIBUTES = tuple("shape dtype device ndim itemsize is_cuda layout requires_grad".split())
# Where torch's functions are defined. Functions from elsewhere may have the same bare names.
_HOMES = frozenset(
    "_operator aten builtins torch torch._tensor torch.functional torch.nn.functional".split()
)


def op_name(node: Node) -> str:
    """The name of an op, one for its function, method, operator, in-place form and overloads.

    An op that is not torch's keeps its namespace or module, as `einops.einops.repeat`, so it has no
    row in `OPS` and no rule. A node that calls nothing has its kind, as "placeholder".
    """
    if node.op not in ("call_function", "call_method"):
        return node.op
    if isinstance(node.target, str):
        return _plain_name(node.target)
    home, name = _home_of(node.target)
    name = _plain_name(name)
    return name if home in _HOMES or home.startswith("torch._C.") else f"{home}.{name}"


def is_op(value: Any, *names: str) -> bool:
    """Whether a value is a node of one of the named ops."""
    return isinstance(value, Node) and op_name(value) in names


def has(value: Any, traits: Trait) -> bool:
    """Whether a value is a node whose op has any of the traits."""
    return isinstance(value, Node) and bool(traits_of(op_name(value)) & traits)


@lru_cache(maxsize=4096)
def traits_of(name: str) -> Trait:
    """The traits of an op: those of its row, and what torch's tags say."""
    traits = OPS.get(name, Trait(0))
    packet: Any = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if hasattr(packet, "overloads") else ():
        tags = getattr(packet, overload).tags
        # `max` and `min` of two tensors are elementwise; their rows are about those of one.
        if torch.Tag.pointwise in tags and not traits & Trait.REDUCE:
            traits |= Trait.POINTWISE
        if torch.Tag.nondeterministic_seeded in tags:
            traits |= Trait.RANDOM
    return traits


def ops_with(traits: Trait) -> frozenset[str]:
    """The ops of the table that have any of the traits."""
    return frozenset(name for name in OPS if traits_of(name) & traits)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_in_place(node: Node) -> bool:
    """Whether a call writes to its first argument: by its spelling, its op or its flag."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__") and name not in _PURE:
        return True
    flagged = node.kwargs.get("inplace") is True or any(a is True for a in node.args[1:])
    return name in _IN_PLACE or has(
        node, Trait.IN_PLACE | Trait.INPLACE_FLAG if flagged else Trait.IN_PLACE
    )


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers; dropout only where it drops anything."""
    if is_op(node, "dropout"):
        training = argument(node, 2, "training", argument(node, 2, "train", True))
        return training is not False and argument(node, 1, "p", 0.5) != 0
    if is_op(node, "scaled_dot_product_attention"):
        return argument(node, 4, "dropout_p", 0.0) != 0
    return has(node, Trait.RANDOM)


def reads_shape(node: Node) -> bool:
    """Whether a call reads no element of its tensors, only a shape, a dtype or the like."""
    attribute = is_op(node, "getattr") and node.args[1] in _SHAPE_ATTRIBUTES
    return attribute or has(node, Trait.READS_SHAPE)


def _home_of(target: Any) -> tuple[str, str]:
    """(namespace or module, name) of a function or an operator."""
    operator = operator_name(target)
    if operator is not None:
        home, _, name = operator.partition(".")
        return home, name
    name = getattr(target, "__name__", str(target))
    owner = getattr(target, "__objclass__", None)
    if isinstance(owner, type) and issubclass(torch.Tensor, owner):
        return torch.Tensor.__module__, name
    # A function that wraps one of torch has taken over its `__module__`.
    written = getattr(target, "__globals__", {}).get("__name__")
    return str(written or getattr(target, "__module__", None)), name


@lru_cache(maxsize=4096)
def _plain_name(name: str) -> str:
    """The name of an op without overload, in-place underscore or second spelling."""
    name = name.split(".")[0]
    if name not in _SPELLINGS and name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    return _SPELLINGS.get(name, name)
