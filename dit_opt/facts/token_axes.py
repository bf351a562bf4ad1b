"""Where the axes of the video tokens occur in the dimensions of other tensors.

A permutation of the tokens acts on a dimension where it holds all their axes contiguously, also as
one segment of a concatenation with text.
"""

from __future__ import annotations

import itertools
from typing import Any

import sympy

from dit_opt.facts.axes import Axis, Dim, leaves, resolve, segments, size


class TokenAxes:
    """The axes of a token dimension, outermost first, and where else they occur.

    Axes are compared by identity, never by size; concatenations by their segments.
    """

    def __init__(self, dim: Dim) -> None:
        self._key = _canonical(dim)
        self._leaves = set(leaves(dim))
        self.length = size(resolve(dim))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenAxes) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def touches(self, dim: Dim) -> bool:
        """Whether a dimension holds any of the axes."""
        return any(leaf in self._leaves for leaf in leaves(dim))

    def count(self, dim: Dim) -> int:
        """How often a dimension holds all axes, contiguously."""
        return self._search(_canonical(dim))[0] if self.touches(dim) else 0

    def is_torn(self, dim: Dim) -> bool:
        """Whether a dimension holds some of the axes apart from the others."""
        return self.touches(dim) and self._search(_canonical(dim))[1]

    def starts(self, dim: Dim) -> tuple[sympy.Expr, ...] | None:
        """Where the tokens start in a dimension that is the tokens, or a concatenation with them.

        None where other axes are around them, as a batch that was folded into the tokens.
        """
        parts = segments(dim)
        offsets = itertools.accumulate(map(size, parts), initial=sympy.S.Zero)
        found = []
        for part, start in zip(parts, offsets, strict=False):
            if _canonical(part) == self._key:
                found.append(sympy.expand(start))
            elif self.touches(part):
                return None
        return tuple(found)

    def _search(self, items: tuple[Any, ...]) -> tuple[int, bool]:
        """(how often all axes occur, whether some occur apart from the others)."""
        count, torn, at = 0, False, 0
        while at < len(items):
            if items[at : at + len(self._key)] == self._key:
                count += 1
                at += len(self._key)
                continue
            item = items[at]
            if isinstance(item, Axis):
                torn |= item in self._leaves
            else:
                inner = [self._search(part) for part in item]
                count += sum(n for n, _ in inner)
                torn |= any(t for _, t in inner)
            at += 1
        return count, torn


def _canonical(dim: Dim) -> tuple[Any, ...]:
    """The leaves of a dimension; a concatenation is a tuple of such tuples."""
    return tuple(
        tuple(map(_canonical, segments((axis,)))) if axis.is_sum else axis for axis in resolve(dim)
    )
