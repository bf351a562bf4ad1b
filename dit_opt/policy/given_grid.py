"""The grid that the user gives, put where it fits: a graph's own proofs come first.

A grid that fits nothing, or more than one thing, is an error and never a guess.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import replace

import sympy

from dit_opt._compat import size_expression
from dit_opt.facts.grids import TokenGrid
from dit_opt.facts.layouts import Layout, declare_grid
from dit_opt.facts.sites import Site
from dit_opt.options import OptionError

Sizes = tuple[int, int, int]


def apply_grid(
    given: Sizes, sites: Sequence[Site], found: Sequence[Layout | None]
) -> list[Layout | None]:
    """The layouts with the grid of the options, where the graph proves none.

    Where nothing in the graph is known to be latents, the tokens of the one input that fits are.

    Raises OptionError where the grid fits no site or the tokens of several inputs, and where the
    graph proves another one for as many tokens.
    """
    layouts = [layout and _apply(layout, given) for layout in found]
    if not any(layout and layout.latents for layout in found):
        wider = [layout and declare_grid(layout, given, among_text=True) for layout in found]
        inputs = {x.latents.source for x in wider if x and x.latents} - {None}
        if len(inputs) < 2:
            layouts = wider
        elif not _has_grid(layouts):
            raise OptionError(
                f"grid={given} fits the tokens of several inputs "
                f"({', '.join(sorted(map(str, inputs)))}), and nothing in this graph tells which "
                "are the latents; leave `grid` out."
            )
    if sites and not _has_grid(layouts):
        raise _refuse(given, sites, found)
    return layouts


def _has_grid(layouts: Sequence[Layout | None]) -> bool:
    return any(layout and layout.grid for layout in layouts)


def _apply(layout: Layout, given: Sizes) -> Layout:
    if layout.grid is None:
        return declare_grid(layout, given)
    if layout.grid.assumed and _cuts_alike(given, layout.grid):
        t, h, w = map(sympy.Integer, given)
        return replace(layout, grid=TokenGrid((t, h, w), "option"))
    proved = layout.grid.sizes
    if not all(size.is_Integer for size in proved):
        # what is proved for every call says more than the grid of one
        fits = all(not p.is_Integer or p == g for p, g in zip(proved, given, strict=True))
    elif proved != given and _product(proved) == _product(given):
        raise _contradict(given, layout.grid)
    else:
        fits = proved == given
    if not fits:
        return replace(layout, grid=None, reason=f"It does not fit grid={given}.")
    return layout


def _cuts_alike(given: Sizes, assumed: TokenGrid) -> bool:
    """Whether the two factors that the graph proves are those of the given grid, regrouped."""
    if not all(size.is_Integer for size in assumed.sizes):
        return False
    _, first, second = map(int, assumed.sizes)
    cuts = tuple(itertools.accumulate(given, operator.mul))
    return cuts[-1] == first * second and first in (1, *cuts)


def _contradict(given: Sizes, proved: TokenGrid) -> OptionError:
    return OptionError(
        f"grid={given} contradicts the graph, which proves ({', '.join(map(str, proved.sizes))}) "
        f"(from its {proved.source}); leave `grid` out."
    )


def _refuse(given: Sizes, sites: Sequence[Site], layouts: Sequence[Layout | None]) -> OptionError:
    """Why a grid fits no site; `layouts` are as they were without it."""
    symbolic = [x.grid for x in layouts if x and x.grid and not _product(x.grid.sizes).is_Integer]
    if symbolic:
        return _contradict(given, symbolic[0])
    counts = sorted(
        {
            size_expression(s.query.meta["example_value"].shape[-2])
            for s in sites
            if s.query is not None
        },
        key=str,
    )
    held = f"the attention sites of this graph hold {', '.join(map(str, counts))}"
    if not all(count.is_Integer for count in counts):
        return OptionError(
            f"grid={given} is {_product(given)} tokens in each call, but {held}, which differ from "
            "call to call, and nothing proves their grid; compile with dynamic=False, or leave "
            "`grid` out."
        )
    if any(count > _product(given) for count in counts) and not any(
        layout and layout.latents for layout in layouts
    ):
        return OptionError(
            f"grid={given} is {_product(given)} tokens, but {held}, and nothing in this graph "
            "tells where among them the latents are; if it is one block of a model, compile the "
            "whole model, or leave `grid` out."
        )
    return OptionError(
        f"grid={given} is {_product(given)} tokens, but {held}; give the (T, H, W) of the latent "
        "tokens after patch embedding, or leave `grid` out."
    )


def _product(grid: Sequence) -> sympy.Expr:
    return math.prod(grid, start=sympy.Integer(1))
