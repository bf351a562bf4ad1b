"""Grids: (T, H, W) of a token axis, from the dimensions of the latents or from the position tables.

A wrong grid makes a wrong sparse pattern, so every result is a proof, or the reason why there is
none. The one exception is marked `assumed`: tables of two factors prove both sizes, and that they
are the rows and columns of one frame, rather than frames and tokens per frame, is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Graph

from dit_opt.facts.axes import Axis, Dim, Origin, leaves, resolve, segments, size
from dit_opt.facts.labels import Labels
from dit_opt.facts.sizes import are_equal
from dit_opt.facts.spans import Span, Spans


@dataclass(frozen=True)
class TokenGrid:
    """Sizes (T, H, W) of the video tokens, row-major; an image has T = 1.

    `source` says what proves or declares them: "latents" (patch embedding), "tables" (position
    tables), "option" (the user), "model" (the whole model, for one of its blocks) or "positions"
    (token ids). `assumed`: only the two factors are proved, not that they are H and W.
    """

    sizes: tuple[sympy.Expr, sympy.Expr, sympy.Expr]
    source: str
    assumed: bool = False


def find_grid(labels: Labels, tokens: Dim) -> TokenGrid | str:
    """The grid of a token axis, or the reason (a clause) why the graph does not prove one."""
    axes = resolve(tokens)
    origins = [origin_of_axes((axis,)) for axis in axes]
    users = [o for o in origins if o is not None and o.user]
    if len(users) == len(axes) and len({o.source for o in users}) == 1:
        if len({o.dim for o in users}) > 1:
            return _from_latents(axes, users)
    grid = _from_tables(labels, axes)
    if grid is not None:
        return grid
    return _explain(labels, axes, origins)


def find_spans(graph: Graph, labels: Labels) -> dict[int, Spans]:
    """The spans of the graph's outputs, by index, of those with tokens on a proved grid.

    They are plain numbers for the graph that takes the outputs next, so dimensions of dynamic size
    are left out.
    """
    (output,) = graph.find_nodes(op="output")
    (outputs,) = output.args
    found = {}
    for i, node in enumerate(outputs if isinstance(outputs, (tuple, list)) else [outputs]):
        dims = labels[node] if labels.is_tensor(node) else []
        spans = []
        for d, dim in enumerate(dims):
            parts = [_find_span(labels, part) for part in segments(dim)]
            known = tuple(part for part in parts if part is not None)
            if len(known) == len(parts) and any(grid for _, grid in known):
                spans.append((d, known))
        if spans:
            found[i] = tuple(spans)
    return found


def _find_span(labels: Labels, part: Dim) -> Span | None:
    length = size(part)
    if not length.is_Integer:
        return None
    grid = find_grid(labels, part)
    if not isinstance(grid, TokenGrid) or grid.assumed:
        return int(length), None
    t, h, w = map(int, grid.sizes)
    return int(length), (t, h, w)


def stack_grids(grids: Sequence[TokenGrid]) -> TokenGrid | str:
    """The grid of concatenated clips or pictures, or the reason (a sentence) why there is none.

    Those of equal height and width count as frames of one grid. Patterns then take the last frame
    of a clip and the first of the next for neighbours in time, which costs a little quality there.
    """
    first = grids[0]
    if not all(_same(grid.sizes[1:], first.sizes[1:]) for grid in grids):
        sizes = ", ".join(f"({', '.join(map(str, grid.sizes))})" for grid in grids)
        return f"The latents are of several grids, {sizes}."
    frames = sum((grid.sizes[0] for grid in grids), sympy.S.Zero)
    return TokenGrid((frames, *first.sizes[1:]), first.source, any(grid.assumed for grid in grids))


def origin_of_axes(dim: Dim) -> Origin | None:
    """The input dimension that all leaves of a dimension stem from; None where they differ."""
    found = {leaf.origin for leaf in leaves(dim)}
    keys = {(o.source, o.dim) if o else None for o in found}
    return next(iter(found)) if len(keys) == 1 else None


def _from_latents(axes: Dim, origins: Sequence[Origin]) -> TokenGrid | str:
    """Factors of one latent dimension belong together; the last two dimensions are H and W."""
    runs = [list(run) for _, run in itertools.groupby(zip(axes, origins, strict=True), _dim_of)]
    dims = [run[0][1].dim for run in runs]
    sizes = [size([axis for axis, _ in run]) for run in runs]
    rank, source = origins[0].rank, origins[0].source
    if sorted(set(dims)) != dims:
        return (
            f"The tokens interleave the dimensions {dims} of '{source}', which is no row-major "
            f"order of (T, H, W)"
        )
    one = sympy.S.One
    if len(sizes) == 3:
        return TokenGrid((sizes[0], sizes[1], sizes[2]), "latents")
    if dims == [rank - 2, rank - 1]:
        return TokenGrid((one, sizes[0], sizes[1]), "latents")
    if dims == [rank - 3, rank - 1]:
        return TokenGrid((sizes[0], one, sizes[1]), "latents")
    return (
        f"The tokens range over the dimensions {dims} of '{source}' with {rank} dimensions, "
        f"and nothing tells which of T, H, W these are"
    )


def _dim_of(pair: tuple[Axis, Origin]) -> int:
    return pair[1].dim


def _from_tables(labels: Labels, axes: Dim) -> TokenGrid | None:
    """The grid from the dimensions that position tables had before a reshape merged them."""
    if any(leaf in labels.disputed for leaf in leaves(axes)):
        return None
    borders = {0, len(axes)}
    full: list[list[sympy.Expr]] = []
    for dims, joined in labels.joins:
        inner = resolve(joined)
        start = _find_run(axes, inner)
        if start is None:
            continue
        factors = [resolve(d) for d in dims]
        borders.update(itertools.accumulate(map(len, factors), initial=start))
        if len(inner) == len(axes):
            sizes = [size(f) for f in factors]
            while len(sizes) > 3 and sizes[0] == 1:
                del sizes[0]
            full.append(sizes)
    marks = sorted(borders)
    runs = [size(axes[a:b]) for a, b in itertools.pairwise(marks)]
    if len(runs) == 3:
        return TokenGrid((runs[0], runs[1], runs[2]), "tables")
    # A trailing size 1 may be W = 1 or no part of the grid.
    if any(s[-1] == 1 for s in full):
        return None
    # An axis of size 1 is no factor; only the merged dimensions show where it was.
    named = [s for s in full if len(s) == 3]
    if named and all(_same(s, named[0]) for s in named) and len(runs) <= 2:
        if [s for s in named[0] if s != 1] == [r for r in runs if r != 1]:
            return TokenGrid((named[0][0], named[0][1], named[0][2]), "tables")
    if len(runs) == 2 and not named and any(len(s) == 2 for s in full):
        return TokenGrid((sympy.S.One, runs[0], runs[1]), "tables", assumed=True)
    return None


def _same(a: Sequence[sympy.Expr], b: Sequence[sympy.Expr]) -> bool:
    return len(a) == len(b) and all(map(are_equal, a, b))


def _find_run(axes: Dim, inner: Dim) -> int | None:
    """Where `inner` stands in `axes`; None where it does not."""
    if not inner:
        return None
    return next(
        (i for i in range(len(axes) - len(inner) + 1) if axes[i : i + len(inner)] == inner), None
    )


def _explain(labels: Labels, axes: Dim, origins: Sequence[Origin | None]) -> str:
    known = [o for o in origins if o is not None and o.user]
    if not known:
        lost = next((leaf for leaf in leaves(axes) if leaf.note), None)
        made = f" (an axis {lost.note})" if lost is not None else ""
        return f"The tokens could not be followed back to an input{made}"
    first = known[0]
    others = sorted(
        {o.source for leaf in leaves(axes) for o in leaf.origins if o.user} - {first.source}
    )
    # Another input that shares the token axis holds ids or tables of the user.
    positions = (
        f"and positions come as {', '.join(map(repr, others))} from outside"
        if others
        else "and no position table in this graph proves their grid"
    )
    return f"The tokens come packed in dimension {first.dim} of '{first.source}' {positions}"
