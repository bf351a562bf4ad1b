"""Rules for ops that keep index spaces: elementwise ops, norms, reductions, constants.

A rule is named after what torch calls the op in public, so functions, methods and dispatcher
overloads share one. It gets the labels and the node's own arguments, unifies the dimensions that
the op iterates over together and returns the label of the value. The rules of the other families
are in `rules_shape`, `rules_parts` and `rules_contract`; `RULES` holds all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from torch.fx import Graph, Node

from dit_opt.facts.axes import Dim, leaves, size, unify
from dit_opt.facts.labels import Labels, NoRule, Rule
from dit_opt.facts.ops import Trait, ops_with
from dit_opt.facts.rules_contract import CONTRACT_RULES
from dit_opt.facts.rules_parts import PART_RULES
from dit_opt.facts.rules_shape import SHAPE_RULES
from dit_opt.facts.sizes import are_equal
from dit_opt.facts.spans import Spans


def label_axes(graph: Graph, hints: Mapping[Node, Spans] | None = None) -> Labels:
    """The axes of all values of a graph, by all rules; `hints` as for `Labels`."""
    return Labels(graph, RULES, hints)


def carry(labels: Labels, x: Any, *_: Any, **__: Any) -> list[Dim]:
    """The value has the index spaces of the first argument."""
    return labels[x]


def constant(labels: Labels, *_: Any, **__: Any) -> list[Dim]:
    """A new tensor begins new axes."""
    return [labels.new(i, length) for i, length in enumerate(labels.sizes())]


def pointwise(labels: Labels, *args: Any, **kwargs: Any) -> list[Dim]:
    """Operands are iterated over together, aligned at the last dimension."""
    operands = [a for a in _flatten([*args, *kwargs.values()]) if labels.is_tensor(a)]
    # Tokens first: they keep their structure where that of a table contradicts it.
    operands.sort(key=labels.is_table)
    dims = [labels[a] for a in operands]
    lengths = labels.sizes()
    return [
        _walk(labels, [d[i] for d in dims if len(d) >= -i], lengths[i])
        for i in range(-len(lengths), 0)
    ]


def normalize(
    labels: Labels,
    x: Node,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> list[Dim]:
    """Norms over the last dimensions, with weights of these dimensions."""
    return pointwise(labels, x, weight, bias)


def group_norm(labels: Labels, x: Node, *args: Any, **kwargs: Any) -> list[Dim]:
    """Channels belong to groups by position."""
    labels.end(labels[x][1])
    for weight in [*args, *kwargs.values()]:
        if labels.is_tensor(weight):
            labels.end(labels[weight][0])
    return labels[x]


def reduce(
    labels: Labels, x: Node, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> list[Dim]:
    """Reduced dimensions vanish; a reduction is alike in every order."""
    label, dim = labels[x], kwargs.get("axis", dim)
    keepdim = kwargs.get("keepdims", keepdim)
    dims = range(len(label)) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    if not all(isinstance(d, int) for d in dims):
        raise NoRule("the dimension is no number")
    gone = {d % len(label) for d in dims}
    return [() if i in gone else d for i, d in enumerate(label) if keepdim or i not in gone]


def norm(
    labels: Labels, x: Node, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> list[Dim]:
    return reduce(labels, x, dim, keepdim)


def extremum(labels: Labels, x: Node, *args: Any, **kwargs: Any) -> list[Dim]:
    """`max` and `min` of one argument; with a dimension they also give positions."""
    if args or kwargs:
        raise NoRule("positions are read")
    return reduce(labels, x)


def _walk(labels: Labels, dims: list[Dim], length: sympy.Expr) -> Dim:
    """One dimension of an elementwise op: an operand of the result's own size is not broadcast."""
    wide = [d for d in dims if are_equal(size(d), length)]
    if not wide:
        if length != 1:
            raise NoRule("no operand has the size of the result")
        return ()
    for other in dims:
        if size(other) == 1:
            continue
        if not are_equal(size(other), length):
            # Neither broadcast nor proved to be as long.
            labels.end(wide[0])
            labels.end(other)
        elif not unify(wide[0], other):
            # Both structures hold of one flat index; only a grid must not be read from either.
            labels.disputed.update(leaves(wide[0]))
            labels.end(wide[0])
            labels.end(other)
    return wide[0]


def _flatten(args: Any) -> list[Any]:
    if isinstance(args, (tuple, list)):
        return [leaf for a in args for leaf in _flatten(a)]
    return [args]


RULES: dict[str, Rule] = {
    # of the ops with a row; `Labels` asks the tags for any other
    **dict.fromkeys(["pointwise", *ops_with(Trait.POINTWISE)], pointwise),
    **dict.fromkeys(ops_with(Trait.CREATES), constant),
    **dict.fromkeys(ops_with(Trait.KEEPS_SHAPE), carry),
    **dict.fromkeys(ops_with(Trait.REDUCE), reduce),
    "layer_norm": normalize,
    "rms_norm": normalize,
    "group_norm": group_norm,
    "norm": norm,
    "linalg_vector_norm": norm,
    "max": extremum,
    "min": extremum,
    **SHAPE_RULES,
    **PART_RULES,
    **CONTRACT_RULES,
}
