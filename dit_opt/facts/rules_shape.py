"""Rules for ops that rearrange dimensions: reshapes, transpositions, broadcasts.

Reshapes are where tokens begin (axes join to one dimension) and where tables show their grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy
from torch.fx import Node

from dit_opt.facts.axes import Dim, regroup, size
from dit_opt.facts.labels import Labels, NoRule, Rule
from dit_opt.facts.nodes import number_of
from dit_opt.facts.sizes import are_equal, divide


def reshape(labels: Labels, x: Node, *_: Any, **__: Any) -> list[Dim]:
    """Regroup factors row-major, within the smallest groups of dimensions of equal products."""
    source, want = labels[x], labels.sizes()
    if any(s == 0 for s in want):
        raise NoRule("a dimension is empty")
    out: list[Dim] = []
    for here, there in _groups([size(d) for d in source], want):
        dims, lengths = source[here], want[there]
        flat = tuple(axis for d in dims for axis in d)
        parts = regroup(flat, lengths)
        if parts is None:
            labels.end(flat)
            parts = [labels.new(("reshape", there.start + i), s) for i, s in enumerate(lengths)]
        wide = [part for part in parts if part]
        if len(dims) > 1 and len(wide) == 1 and labels.is_table(x):
            # A following size 1 may be W = 1 or a dimension of heads, so readers of joins get it.
            tail = source[here.stop : here.stop + 1]
            labels.joins.append((tuple(dims + [d for d in tail if not d]), wide[0]))
        out += parts
    return out


def _groups(
    source: Sequence[sympy.Expr], want: Sequence[sympy.Expr]
) -> Iterator[tuple[slice, slice]]:
    """The smallest runs of dimensions with equal products, as slices of both shapes."""
    i = j = 0
    while i < len(source) or j < len(want):
        first, a, b = (i, j), sympy.S.One, sympy.S.One
        if i < len(source):
            a, i = source[i], i + 1
        if j < len(want):
            b, j = want[j], j + 1
        while not are_equal(a, b):
            more_source, more_want = i < len(source), j < len(want)
            if more_source and (not more_want or _is_part(a, b)):
                a, i = a * source[i], i + 1
            elif more_want:
                b, j = b * want[j], j + 1
            else:
                raise NoRule("the products of the sizes are not proved equal")
        if j == len(want):
            i = len(source) if all(s == 1 for s in source[i:]) else i
        yield slice(first[0], i), slice(first[1], j)


def _is_part(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether `a` is the product that must grow."""
    if a.is_Integer and b.is_Integer:
        return a < b
    return divide(b, a) is not None


def unsqueeze(labels: Labels, x: Node, dim: int) -> list[Dim]:
    label = list(labels[x])
    label.insert(dim % (len(label) + 1), ())
    return label


def permute(labels: Labels, x: Node, *dims: Any, **kwargs: Any) -> list[Dim]:
    dims = kwargs.get("dims", dims)
    order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return [labels[x][d] for d in order]


def transpose(labels: Labels, x: Node, dim0: int, dim1: int) -> list[Dim]:
    label = list(labels[x])
    label[dim0], label[dim1] = label[dim1], label[dim0]
    return label


def movedim(labels: Labels, x: Node, source: Any, destination: Any) -> list[Dim]:
    label = labels[x]
    pair = [
        [d % len(label) for d in (dims if isinstance(dims, (tuple, list)) else (dims,))]
        for dims in (source, destination)
    ]
    moved = dict(zip(pair[1], pair[0], strict=True))
    rest = iter(i for i in range(len(label)) if i not in pair[0])
    return [label[moved[i] if i in moved else next(rest)] for i in range(len(label))]


def reverse(labels: Labels, x: Node, *_: Any) -> list[Dim]:
    """`x.T`."""
    return labels[x][::-1]


def transpose_last(labels: Labels, x: Node, *_: Any) -> list[Dim]:
    """`x.mT`, and `x.t()` of a matrix."""
    return transpose(labels, x, -1, -2) if len(labels[x]) > 1 else labels[x]


def attribute(labels: Labels, x: Node, name: str) -> list[Dim]:
    """`getattr(x, "mT")`."""
    named = {"T": reverse, "mT": transpose_last, "H": transpose_last, "mH": transpose_last}
    if name in named:
        return named[name](labels, x)
    if name in ("data", "real", "imag"):
        return labels[x]
    raise NoRule(f"attribute {name}")


def expand(labels: Labels, x: Node, *_: Any, **__: Any) -> list[Dim]:
    """New axes for the dimensions that begin to repeat."""
    want = labels.sizes()
    label: list[Dim] = [()] * (len(want) - len(labels[x])) + labels[x]
    return [
        d if are_equal(size(d), s) else _repeat(labels, d, s, i)
        for i, (d, s) in enumerate(zip(label, want, strict=True))
    ]


def _repeat(labels: Labels, dim: Dim, length: sympy.Expr, slot: int) -> Dim:
    if dim:
        raise NoRule(f"a dimension of size {size(dim)} cannot be expanded to {length}")
    return labels.new(("expand", slot), length)


def repeat(labels: Labels, x: Node, *_: Any, **__: Any) -> list[Dim]:
    """A new outer axis for each dimension that repeats."""
    want = labels.sizes()
    label: list[Dim] = [()] * (len(want) - len(labels[x])) + labels[x]
    return [
        labels.new(("repeat", i), _times(size(d), s)) + d
        for i, (d, s) in enumerate(zip(label, want, strict=True))
    ]


def repeat_interleave(
    labels: Labels, x: Node, repeats: Any, dim: int | None = None, **_: Any
) -> list[Dim]:
    """A new inner axis, if every entry repeats as often."""
    if number_of(repeats) is None or dim is None:
        raise NoRule("counts differ from entry to entry")
    label = list(labels[x])
    label[dim] += labels.new("interleave", _times(size(label[dim]), labels.sizes()[dim]))
    return label


def _times(old: sympy.Expr, new: sympy.Expr) -> sympy.Expr:
    times = divide(new, old)
    if times is None:
        raise NoRule(f"{new} is not proved to be a multiple of {old}")
    return times


def meshgrid(labels: Labels, *tensors: Any, indexing: str = "ij") -> tuple[list[Dim], ...]:
    inputs = tensors if isinstance(tensors[0], Node) else tensors[0]
    dims = [labels[t][0] if labels[t] else () for t in inputs]
    if indexing == "xy":
        dims[:2] = dims[1::-1]
    return tuple(list(dims) for _ in inputs)


def view_as_complex(labels: Labels, x: Node) -> list[Dim]:
    return labels[x][:-1]


def view_as_real(labels: Labels, x: Node) -> list[Dim]:
    return [*labels[x], labels.new("complex", sympy.Integer(2))]


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys("reshape view flatten unflatten squeeze ravel".split(), reshape),
    "unsqueeze": unsqueeze,
    "permute": permute,
    "transpose": transpose,
    "movedim": movedim,
    "numpy_T": reverse,
    "t": transpose_last,
    "mT": transpose_last,
    "getattr": attribute,
    **dict.fromkeys("expand expand_as broadcast_to".split(), expand),
    **dict.fromkeys("repeat tile".split(), repeat),
    "repeat_interleave": repeat_interleave,
    "meshgrid": meshgrid,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
}
