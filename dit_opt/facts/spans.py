"""Spans: how tokens lie in a tensor that one graph returns and a later one takes.

Dynamo breaks some models into several graphs. What a graph proves about the tokens of its outputs
is passed to the next one as plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import sympy

from dit_opt.facts.axes import Axis, Dim, Product, axis_of, cut, resolve, segments, size
from dit_opt.facts.sizes import Grid, are_equal

# Tokens in a row: how many, and their (T, H, W) where it is proved.
Span: TypeAlias = "tuple[int, Grid | None]"
# (dimension of a tensor, the tokens along it), for each dimension that has known tokens
Spans: TypeAlias = "tuple[tuple[int, tuple[Span, ...]], ...]"


def apply_spans(dim: Dim, spans: Sequence[Span]) -> None:
    """Give a dimension of an input the structure that spans describe.

    Tokens on a grid become three axes, as if they were the last three dimensions of the input. A
    dimension whose size does not match stays as it is.
    """
    if len(dim) != 1 or not are_equal(size(dim), sympy.Integer(sum(n for n, _ in spans))):
        return
    if len(spans) > 1:
        cut(dim[0], [sympy.Integer(length) for length, _ in spans])
    for part, (_, grid) in zip(segments(dim), spans, strict=True):
        if grid is not None:
            for axis in resolve(part):
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
