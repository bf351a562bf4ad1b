"""Layouts: which tokens of an attention site are latents, which are text, and their grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import sympy

from dit_opt.facts.grids import TokenGrid
from dit_opt.facts.sizes import Grid, are_equal


class SiteKind(Enum):
    """How queries and keys are related.

    SELF: the same tokens. JOINT: the same in several segments, or latents and more among the keys.
    CROSS: keys hold none of the queries' tokens. UNKNOWN: not proved.
    """

    SELF = "self"
    JOINT = "joint"
    CROSS = "cross"
    UNKNOWN = "unknown"


class SegmentKind(Enum):
    """LATENTS become the graph's output, TEXT stems from another user input, OTHER is the rest."""

    LATENTS = "latents"
    TEXT = "text"
    OTHER = "other"


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to before `stop` of one site; `source` names the input they stem from."""

    kind: SegmentKind
    start: sympy.Expr
    stop: sympy.Expr
    source: str | None


@dataclass(frozen=True)
class Layout:
    """The tokens of one site. `reason` says why there is no grid; "" where there is one."""

    kind: SiteKind
    query: tuple[Segment, ...]
    key: tuple[Segment, ...]
    grid: TokenGrid | None
    reason: str

    @property
    def latents(self) -> Segment | None:
        """The segment of the queries that holds the latents; None where nothing proves one."""
        return next((s for s in self.query if s.kind is SegmentKind.LATENTS), None)


def declare_grid(
    layout: Layout,
    sizes: Grid,
    source: str = "option",
    among_text: bool = False,
) -> Layout:
    """The layout with a grid from outside of the graph, where the graph proves none.

    The one segment of T * H * W tokens becomes the latents. Where no segment or more than one has
    that many tokens, only the reason changes; a layout with a grid is returned as it is.

    Segments of TEXT are candidates only with `among_text`, for graphs that do not show which tokens
    reach their output: there the latents look like any other user input.
    """
    if layout.grid is not None:
        return layout
    total = sympy.Integer(sizes[0] * sizes[1] * sizes[2])
    fitting = [s for s in layout.query if are_equal(sympy.expand(s.stop - s.start), total)]
    others = [s for s in fitting if s.kind is not SegmentKind.TEXT]
    fitting = others or (fitting if among_text else [])
    fitting = [s for s in fitting if s.kind is SegmentKind.LATENTS] or fitting
    if len(fitting) != 1:
        lengths = ", ".join(str(sympy.expand(s.stop - s.start)) for s in layout.query)
        found = "No segment" if not fitting else f"{len(fitting)} segments"
        return replace(
            layout,
            reason=f"{found} of this site's queries (of {lengths} tokens) fit the grid {sizes} "
            f"of {total} tokens. {layout.reason}",
        )
    latents = fitting[0]
    named = tuple(replace(s, kind=SegmentKind.LATENTS) if s is latents else s for s in layout.query)
    key = named if layout.key == layout.query else layout.key
    t, h, w = map(sympy.Integer, sizes)
    return replace(layout, query=named, key=key, grid=TokenGrid((t, h, w), source), reason="")
