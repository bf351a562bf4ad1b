"""Tokens: what the queries and keys of each attention site range over.

Every other system is told by hand, per model, where the video tokens are; here the graph proves it,
or says why not.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import sympy
from torch.fx import Graph, Node

from dit_opt.facts.axes import Axis, Dim, leaves, segments, size
from dit_opt.facts.grids import Grid, find_grid, origin_of_axes
from dit_opt.facts.labels import Labels, NoRule
from dit_opt.facts.rules import label_axes
from dit_opt.facts.sites import Form, Site
from dit_opt.facts.sizes import are_equal

__all__ = [
    "Grid",
    "Layout",
    "Segment",
    "SegmentKind",
    "SiteKind",
    "Tokens",
    "declare_grid",
    "find_tokens",
]

OPTION_HINT = 'pass options={"grid": (T, H, W)}.'

log = logging.getLogger(__name__)


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
    grid: Grid | None
    reason: str

    @property
    def latents(self) -> Segment | None:
        """The segment of the queries that holds the latents; None where nothing proves one."""
        return next((s for s in self.query if s.kind is SegmentKind.LATENTS), None)


@dataclass(frozen=True)
class Tokens:
    """The layouts of all sites of a graph, by `site.node`, and the labels they were read from."""

    layouts: Mapping[Node, Layout]
    labels: Labels = field(repr=False, compare=False)


def find_tokens(graph: Graph, sites: Sequence[Site]) -> Tokens:
    """The token layout of every site.

    Args:
        graph: a pre-grad graph as Dynamo makes it, with fake tensors in `meta["example_value"]`. It
        is read only, and
            no guard is added under dynamic shapes.
        sites: from `find_sites` of the same graph.
    """
    labels = label_axes(graph)
    tokens = {site.node: _token_dims(labels, site) for site in sites}
    reader = _Reader(labels, graph, [d for d in tokens.values() if not isinstance(d, str)])
    layouts = {
        node: _unknown(dims) if isinstance(dims, str) else reader.read(*dims)
        for node, dims in tokens.items()
    }
    for node, layout in layouts.items():
        log.debug("%s: %s", node.name, layout)
    return Tokens(layouts, labels)


def declare_grid(
    layout: Layout,
    sizes: tuple[int, int, int],
    source: str = "option",
    among_text: bool = False,
) -> Layout:
    """The layout with a grid that the user gives, or the whole model, where the graph proves none.

    The one segment of T * H * W tokens becomes the latents. A layout with a grid of its own, or in
    which no segment or more than one has that many tokens, comes back as it is but for the reason.

    Segments of TEXT are left out unless `among_text`: in a graph that does not show which tokens
    reach its output, the latents are one more user input.
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
    return replace(layout, query=named, key=key, grid=Grid((t, h, w), source), reason="")


def _token_dims(labels: Labels, site: Site) -> tuple[Dim, Dim] | str:
    """The token dimensions of queries and keys, or why they are unknown."""
    if site.form in (Form.MULTIHEAD, Form.FOREIGN) or site.query is None or site.key is None:
        return f"The call hides its queries and keys ({site.form.value})."
    try:
        return labels[site.query][-2], labels[site.key][-2]
    except (NoRule, IndexError):
        return "The queries and keys are no tensors of two dimensions or more."


def _unknown(reason: str) -> Layout:
    return Layout(SiteKind.UNKNOWN, (), (), None, reason)


class _Reader:
    """Reads the dimensions of sites against what reaches the graph's output."""

    def __init__(self, labels: Labels, graph: Graph, sites: Sequence[tuple[Dim, Dim]]) -> None:
        self._labels = labels
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self._alive = {
            leaf
            for node in output.all_input_nodes
            if labels.is_tensor(node)
            for dim in labels[node]
            for leaf in leaves(dim)
        }
        queries = [part for query, _ in sites for part in segments(query)]
        if not any(map(self._reaches_output, queries)):
            self._alive.update(_gridded_leaves(queries))
        self._latent_sources = {
            origin.source
            for part in queries
            if self._reaches_output(part) and (origin := origin_of_axes(part)) and origin.user
        }
        # Text that has tokens of its own somewhere is not among the latents.
        self._has_text = any(
            origin.user and origin.floating and not self._reaches_output(part)
            for dims in sites
            for dim in dims
            for part in segments(dim)
            if (origin := origin_of_axes(part)) is not None
        )

    def read(self, query: Dim, key: Dim) -> Layout:
        query_parts, key_parts = segments(query), segments(key)
        latents, grid, reason = self._find_latents(query_parts)
        return Layout(
            self._kind(query_parts, key_parts),
            self._segments(query_parts, latents),
            self._segments(key_parts, latents),
            grid,
            reason,
        )

    def _find_latents(self, parts: Sequence[Dim]) -> tuple[Dim | None, Grid | None, str]:
        """(the latents' segment, its grid, why it has none)."""
        alive = [p for p in parts if self._reaches_output(p)]
        if not alive:
            notes = [leaf.note for part in parts for leaf in leaves(part) if leaf.note]
            made = f" They range over an axis {notes[0]}." if notes else ""
            return None, None, f"No token of the queries is proved to reach the output.{made}"
        if len(alive) > 1:
            names = ", ".join(str(self._source(p)) for p in alive)
            return (
                None,
                None,
                (
                    f"Several segments reach the output ({names}), and nothing in this graph tells "
                    f"which holds the latents; {OPTION_HINT}"
                ),
            )
        found = find_grid(self._labels, alive[0])
        if isinstance(found, Grid):
            return alive[0], found, ""
        if len(parts) == 1 and not self._has_text:
            doubt = "and nothing tells whether text is among them"
            return None, None, f"{found}, {doubt}; {OPTION_HINT}"
        return alive[0], None, f"{found}; {OPTION_HINT}"

    def _kind(self, query: Sequence[Dim], key: Sequence[Dim]) -> SiteKind:
        mine = [leaf for part in query for leaf in leaves(part)]
        theirs = [leaf for part in key for leaf in leaves(part)]
        if not mine:
            return SiteKind.UNKNOWN
        if mine == theirs:
            return SiteKind.SELF if len(query) == 1 else SiteKind.JOINT
        shared = set(mine) & set(theirs)
        if shared:
            latents = {leaf for leaf in mine if leaf in self._alive}
            return SiteKind.JOINT if latents and latents <= shared else SiteKind.UNKNOWN
        # Axes without an origin may be the queries' own tokens, lost at an op without a rule.
        known = all(leaf.origins for leaf in theirs) and all(leaf.origins for leaf in mine)
        return SiteKind.CROSS if known else SiteKind.UNKNOWN

    def _segments(self, parts: Sequence[Dim], latents: Dim | None) -> tuple[Segment, ...]:
        stops = list(itertools.accumulate(map(size, parts), initial=sympy.S.Zero))
        return tuple(
            Segment(self._segment_kind(part, latents), start, stop, self._source(part))
            for part, (start, stop) in zip(parts, itertools.pairwise(stops), strict=True)
        )

    def _segment_kind(self, part: Dim, latents: Dim | None) -> SegmentKind:
        if latents is not None and leaves(part) == leaves(latents):
            return SegmentKind.LATENTS
        origin = origin_of_axes(part)
        text = origin is not None and origin.user and origin.source not in self._latent_sources
        return SegmentKind.TEXT if text else SegmentKind.OTHER

    def _reaches_output(self, part: Dim) -> bool:
        own: tuple[Axis, ...] = leaves(part)
        return bool(own) and all(leaf in self._alive for leaf in own)

    def _source(self, part: Dim) -> str | None:
        names = {leaf.origin.source for leaf in leaves(part) if leaf.origin and leaf.origin.user}
        return names.pop() if len(names) == 1 else None


def _gridded_leaves(parts: Sequence[Dim]) -> set[Axis]:
    """Where the graph's end is not understood: tokens over several dimensions of the one input."""
    found: dict[str, set[Axis]] = {}
    for part in parts:
        axes = leaves(part)
        origins = {leaf.origin for leaf in axes}
        dims = {(o.source, o.dim) for o in origins if o is not None and o.user and o.floating}
        if len(dims) == len(origins) > 1 and len({source for source, _ in dims}) == 1:
            found.setdefault(next(iter(dims))[0], set()).update(axes)
    return next(iter(found.values())) if len(found) == 1 else set()
