"""Index spaces: what a dimension of a tensor ranges over, and when two range over the same.

A dimension is a row-major product of axes. An axis is a leaf, a product of axes (a reshape split
it) or a sum of dimensions (a concatenation). Axes have identity: sizes never identify anything,
only `unify` ties two axes, as terms are unified in Prolog. Hence facts flow backwards too: packed
tokens multiplied by a table over (T, H, W) learn their grid. Sizes are sympy expressions and every
decision on them is a proof; what cannot be proved counts as different.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy

from dit_opt.facts.sizes import are_equal, divide

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Origin:
    """The graph input and dimension that an axis stems from.

    `rank` is the input's number of dimensions, `extents` how many of them are not of size 1.
    """

    source: str
    dim: int
    rank: int
    extents: int
    floating: bool
    user: bool

    @property
    def weight(self) -> tuple[bool, bool, int, bool]:
        """Sort key for the input to name: latents before ids, masks and tables.

        Latents are user inputs, floating, of many dimensions or [B, N, C]; ids and masks are
        integers or smaller, and tables have dimensions of size 1.
        """
        return self.user, self.floating, self.extents, self.rank == 3


@dataclass(eq=False, slots=True)
class Axis:
    """One index space.

    `origins` are the inputs it stems from, by `Origin.weight`; without any, `note` says which op
    made it. `bound` is what unification found it to be: nothing yet, another axis, a product
    (`Product`) or a concatenation (`Sum`).
    """

    size: sympy.Expr
    origins: tuple[Origin, ...] = ()
    note: str = ""
    bound: Axis | Product | Sum | None = field(default=None, repr=False)

    @property
    def origin(self) -> Origin | None:
        return self.origins[0] if self.origins else None

    @property
    def is_leaf(self) -> bool:
        return self.bound is None

    @property
    def is_sum(self) -> bool:
        return isinstance(self.bound, Sum)


# Axes of one dimension, outermost first; () has size 1.
Dim: TypeAlias = tuple[Axis, ...]


@dataclass(frozen=True)
class Product:
    """An axis that is several, row-major."""

    factors: Dim


@dataclass(frozen=True)
class Sum:
    """An axis that is a concatenation of dimensions."""

    segments: tuple[Dim, ...]


def axis_of(length: sympy.Expr, origins: Iterable[Origin] = (), note: str = "") -> Dim:
    """A dimension of one new axis, or of none where the length is 1."""
    return () if length == 1 else (Axis(length, tuple(origins), note),)


def resolve(dim: Iterable[Axis]) -> Dim:
    """The dimension as leaf and sum axes, all that unification found put in."""
    out: list[Axis] = []
    for axis in dim:
        axis = _find(axis)
        if isinstance(axis.bound, Product):
            out += resolve(axis.bound.factors)
        else:
            out.append(axis)
    return tuple(out)


def size(dim: Sequence[Axis]) -> sympy.Expr:
    """The number of indices of a dimension."""
    if len(dim) == 1:
        return dim[0].size
    return math.prod((axis.size for axis in dim), start=ONE)


def segments(dim: Dim) -> tuple[Dim, ...]:
    """The parts of a concatenation, nested ones opened; of anything else the dimension itself."""
    dim = resolve(dim)
    if len(dim) != 1 or not isinstance(dim[0].bound, Sum):
        return (dim,)
    return tuple(part for segment in dim[0].bound.segments for part in segments(segment))


def leaves(dim: Dim) -> tuple[Axis, ...]:
    """All leaves of a dimension, those inside of concatenations too."""
    return tuple(
        leaf
        for axis in resolve(dim)
        for leaf in (
            [inner for part in segments((axis,)) for inner in leaves(part)]
            if axis.is_sum
            else [axis]
        )
    )


def unify(x: Dim, y: Dim) -> bool:
    """State that two dimensions are one index space. False where their structures cannot agree.

    Symmetric; sizes stay; axes of one dimension are never tied to each other (a table laid out as
    (W, H) over a square grid would make H and W the same axis).
    """
    x, y = resolve(x), resolve(y)
    if x == y:
        return True
    cuts = _common_cuts([a.size for a in x], [a.size for a in y])
    if cuts is None or not _can_cut(x + y, cuts[0] + cuts[1]):
        return False
    for axis, sizes in zip(x + y, cuts[0] + cuts[1], strict=True):
        if len(sizes) > 1 and axis.is_leaf:
            axis.bound = Product(tuple(Axis(s, axis.origins, axis.note) for s in sizes))
    x, y = resolve(x), resolve(y)
    if len(x) != len(y):
        return False
    agreed = True
    for a, b in zip(x, y, strict=True):
        if a in y or b in x:
            continue
        agreed &= _unify_axes(a, b)
    return agreed


def regroup(dim: Dim, sizes: Sequence[sympy.Expr]) -> list[Dim] | None:
    """The dimension cut row-major into dimensions of these sizes; None where that is impossible."""
    template = tuple(Axis(s) for s in sizes if s != 1)
    if not unify(template, dim):
        return None
    parts = iter(template)
    return [() if s == 1 else resolve((next(parts),)) for s in sizes]


def join(dims: Sequence[Dim], axis: Axis | None = None) -> Dim:
    """The concatenation of dimensions, as `axis` if given; dimensions of size 0 vanish."""
    dims = tuple(d for d in dims if not are_equal(size(d), sympy.S.Zero))
    if len(dims) == 1:
        return dims[0]
    if axis is None:
        axis = Axis(sum((size(d) for d in dims), sympy.S.Zero))
    if axis.is_leaf or axis.is_sum:
        axis.bound = Sum(dims)
    return (axis,)


def cut(axis: Axis, sizes: Sequence[sympy.Expr]) -> None:
    """Make a leaf the concatenation of new leaves."""
    assert axis.is_leaf, f"Only a leaf can be cut, not {axis}."
    axis.bound = Sum(tuple(axis_of(s, axis.origins, axis.note) for s in sizes))


def _find(axis: Axis) -> Axis:
    root = axis
    while isinstance(root.bound, Axis):
        root = root.bound
    while isinstance(axis.bound, Axis):
        axis.bound, axis = root, axis.bound
    return root


def _common_cuts(
    x: Sequence[sympy.Expr], y: Sequence[sympy.Expr]
) -> tuple[list[list[sympy.Expr]], list[list[sympy.Expr]]] | None:
    """How each factor of two lists splits so that both lists become the same; None: they cannot."""
    cuts: tuple[list[list[sympy.Expr]], list[list[sympy.Expr]]] = ([], [])
    left, right = list(x)[::-1], list(y)[::-1]
    fresh_left = fresh_right = True
    while left and right:
        a, b = left.pop(), right.pop()
        if are_equal(a, b):
            piece, rest_a, rest_b = a, None, None
        elif (rest_b := divide(b, a)) is not None:
            piece, rest_a = a, None
        elif (rest_a := divide(a, b)) is not None:
            piece, rest_b = b, None
        else:
            return None
        for side, fresh in ((0, fresh_left), (1, fresh_right)):
            if fresh:
                cuts[side].append([])
            cuts[side][-1].append(piece)
        fresh_left, fresh_right = rest_a is None, rest_b is None
        if rest_a is not None:
            left.append(rest_a)
        if rest_b is not None:
            right.append(rest_b)
    return None if left or right else cuts


def _can_cut(axes: Sequence[Axis], cuts: Sequence[Sequence[sympy.Expr]]) -> bool:
    """Whether every axis can be split so: sums cannot, and one axis cannot be split in two ways."""
    seen: dict[Axis, Sequence[sympy.Expr]] = {}
    return all(
        (len(sizes) == 1 or axis.is_leaf) and seen.setdefault(axis, sizes) == sizes
        for axis, sizes in zip(axes, cuts, strict=True)
    )


def _unify_axes(a: Axis, b: Axis) -> bool:
    # Earlier pairs of the same dimensions may have bound these.
    x, y = resolve((a,)), resolve((b,))
    if len(x) != 1 or len(y) != 1:
        return unify(x, y)
    (a,), (b,) = x, y
    if a is b:
        return True
    if a.is_sum and b.is_sum:
        return _unify_sums(a, b)
    if a.is_sum:
        a, b = b, a
    for leaf in leaves((b,)) if b.is_sum else (b,):
        leaf.origins = _merge(a.origins, leaf.origins)
    a.bound = b
    return True


def _merge(x: tuple[Origin, ...], y: tuple[Origin, ...]) -> tuple[Origin, ...]:
    """The origins of both, best first; of equals, those of `x` come first."""
    new = [o for o in y if o not in x]
    return tuple(sorted([*x, *new], key=lambda o: o.weight, reverse=True)) if new else x


def _unify_sums(a: Axis, b: Axis) -> bool:
    """Segment by segment; a leaf segment is cut where the other sum has a boundary."""
    left, right = list(segments((a,)))[::-1], list(segments((b,)))[::-1]
    agreed = True
    while left and right:
        x, y = left.pop(), right.pop()
        longer, rest = (x, left) if _is_longer(size(x), size(y)) else (y, right)
        shorter = y if longer is x else x
        if not are_equal(size(x), size(y)):
            if not _is_longer(size(longer), size(shorter)) or len(longer) != 1:
                return False
            if not longer[0].is_leaf:
                return False
            cut(longer[0], (size(shorter), size(longer) - size(shorter)))
            first, second = segments(longer)
            rest.append(second)
            longer = first
        agreed &= unify(longer, shorter)
    return agreed and not left and not right


def _is_longer(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(sympy.expand(a - b).is_positive)
