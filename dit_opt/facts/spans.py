"""Spans: what is known of the tokens of a graph's input from the graph that returned it.

Dynamo breaks some models apart. Each graph then sees tensors where the latents were, and what the
one before proved of their tokens is handed on in numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import sympy

from dit_opt.facts.axes import Axis, Dim, Product, axis_of, cut, resolve, segments, size
from dit_opt.facts.sizes import Grid, are_equal

__all__ = ["Span", "Spans", "apply_spans"]

# Tokens in a row: how many, and their (T, H, W) where it is proved.
Span: TypeAlias = "tuple[int, Grid | None]"
# (dimension of a tensor, what stands in it), of the dimensions of which anything is known
Spans: TypeAlias = "tuple[tuple[int, tuple[Span, ...]], ...]"


def apply_spans(dim: Dim, spans: Sequence[Span]) -> None:
    """Give a dimension that an input begins the structure that is known of it.

    Tokens on a grid become three axes, as if the input had them as its last three dimensions. A
    dimension of another size stays as it is.
    """
    if len(dim) != 1 or not are_equal(size(dim), sympy.Integer(sum(n for n, _ in spans))):
        return
    if len(spans) > 1:
        cut(dim[0], [sympy.Integer(length) for length, _ in spans])
    for part, (_, grid) in zip(segments(dim), spans, strict=True):
        for axis in resolve(part) if grid is not None else ():
            axis.bound = Product(_grid_axes(axis, grid))


def _grid_axes(axis: Axis, grid: Sequence[int]) -> Dim:
    return tuple(
        part
        for i, length in enumerate(grid)
        for part in axis_of(
            sympy.Integer(length),
            [replace(origin, dim=i, rank=3, extents=3) for origin in axis.origins],
        )
    )
