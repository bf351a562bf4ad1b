"""Tokens: what the queries and keys of each attention site range over.

Every other system is told by hand, per model, where the video tokens are; here the graph proves it,
or says why not.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from torch.fx import Graph, Node

from dit_opt.facts.axes import Axis, Dim, leaves, segments, size
from dit_opt.facts.grids import TokenGrid, find_grid, find_spans, origin_of_axes, stack_grids
from dit_opt.facts.labels import Labels, NoRule
from dit_opt.facts.layouts import Layout, Segment, SegmentKind, SiteKind
from dit_opt.facts.rules import label_axes
from dit_opt.facts.sites import Form, Site
from dit_opt.facts.spans import Spans

OPTION_HINT = 'pass options={"grid": (T, H, W)}.'

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of a graph.

    Attributes:
        layouts: those of all sites, by `site.node`. labels: what they were read from.
        spans: how the tokens lie in the graph's outputs, by index; for the next graph, where
            Dynamo breaks a model into several.
    """

    layouts: Mapping[Node, Layout]
    labels: Labels = field(repr=False, compare=False)
    spans: Mapping[int, Spans] = field(default_factory=dict)

    @property
    def forwards_latents(self) -> bool:
        """Whether this graph only returns latents, for another graph to attend over."""
        return bool(self.spans) and not any(layout.latents for layout in self.layouts.values())


def find_tokens(
    graph: Graph, sites: Sequence[Site], hints: Mapping[Node, Spans] | None = None
) -> Tokens:
    """The token layout of every site.

    Args:
        graph: a pre-grad graph as Dynamo makes it, with fake tensors in `meta["example_value"]`. It
            is read only, and no guard is added under dynamic shapes.
        sites: from `find_sites` of the same graph.
        hints: how the tokens of inputs lie, where an earlier graph proved it.
    """
    labels = label_axes(graph, hints)
    tokens = {site.node: _token_dims(labels, site) for site in sites}
    reader = _LayoutReader(labels, graph, [d for d in tokens.values() if not isinstance(d, str)])
    layouts = {
        node: _unknown(dims) if isinstance(dims, str) else reader.read(*dims)
        for node, dims in tokens.items()
    }
    for node, layout in layouts.items():
        log.debug("%s: %s", node.name, layout)
    return Tokens(layouts, labels, find_spans(graph, labels))


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


class _LayoutReader:
    """Classifies the token dimensions of sites by which of their axes reach the graph's output."""

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
        # Where text has axes of its own at some site, it is not hidden among the latents.
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

    def _find_latents(self, parts: Sequence[Dim]) -> tuple[Sequence[Dim], TokenGrid | None, str]:
        """(the segments that are latents, side by side; their grid; why there is none)."""
        alive = [p for p in parts if self._reaches_output(p)]
        if not alive:
            notes = [leaf.note for part in parts for leaf in leaves(part) if leaf.note]
            made = f" They range over an axis {notes[0]}." if notes else ""
            return (), None, f"No token of the queries is proved to reach the output.{made}"
        if len(alive) > 1:
            return self._choose_gridded(parts)
        found = find_grid(self._labels, alive[0])
        if isinstance(found, TokenGrid):
            return alive, found, ""
        if len(parts) == 1 and not self._has_text:
            doubt = "and nothing tells whether text is among them"
            return (), None, f"{found}, {doubt}; {OPTION_HINT}"
        return alive, None, f"{found}; {OPTION_HINT}"

    def _choose_gridded(self, parts: Sequence[Dim]) -> tuple[Sequence[Dim], TokenGrid | None, str]:
        """Of several segments that reach the output, those with a grid: text has none.

        They may be the pictures of an edit, or a clip and its conditioning frames; the same tokens
        twice are neither.
        """
        alive = [p for p in parts if self._reaches_output(p)]
        grids = {p: g for p in alive if isinstance(g := find_grid(self._labels, p), TokenGrid)}
        places = [i for i, part in enumerate(parts) if part in grids]
        if places and len(grids) == len(places) == places[-1] - places[0] + 1:
            stacked = stack_grids([grids[parts[i]] for i in places])
            latents = parts[places[0] : places[-1] + 1]
            if isinstance(stacked, TokenGrid):
                return latents, stacked, ""
            return latents, None, stacked
        names = ", ".join(str(self._source([p])) for p in alive)
        reason = (
            f"Several segments reach the output ({names}), and nothing in this graph tells which "
            f"holds the latents; {OPTION_HINT}"
        )
        return (), None, reason

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
        # Axes without an origin may be tokens of the queries, lost at an op without a rule.
        known = all(leaf.origins for leaf in theirs) and all(leaf.origins for leaf in mine)
        return SiteKind.CROSS if known else SiteKind.UNKNOWN

    def _segments(self, parts: Sequence[Dim], latents: Sequence[Dim]) -> tuple[Segment, ...]:
        """What a dimension holds, from its parts; latents that stand side by side are one."""
        stops = list(itertools.accumulate(map(size, parts), initial=sympy.S.Zero))
        place = _find_parts(parts, latents)
        out = []
        for i, part in enumerate(parts):
            if i not in place:
                kind = self._segment_kind(part)
                out.append(Segment(kind, stops[i], stops[i + 1], self._source([part])))
            elif i == place[0]:
                ends = stops[i], stops[place[-1] + 1]
                out.append(Segment(SegmentKind.LATENTS, *ends, self._source(latents)))
        return tuple(out)

    def _segment_kind(self, part: Dim) -> SegmentKind:
        origin = origin_of_axes(part)
        text = origin is not None and origin.user and origin.source not in self._latent_sources
        return SegmentKind.TEXT if text else SegmentKind.OTHER

    def _reaches_output(self, part: Dim) -> bool:
        own: tuple[Axis, ...] = leaves(part)
        return bool(own) and all(leaf in self._alive for leaf in own)

    def _source(self, parts: Sequence[Dim]) -> str | None:
        axes = [leaf for part in parts for leaf in leaves(part)]
        names = {leaf.origin.source for leaf in axes if leaf.origin and leaf.origin.user}
        return names.pop() if len(names) == 1 else None


def _find_parts(parts: Sequence[Dim], wanted: Sequence[Dim]) -> range:
    """Where `wanted` stand side by side among `parts`; empty where they do not."""
    here, there = [list(map(leaves, dims)) for dims in (parts, wanted)]
    for start in range(len(here) - len(there) + 1) if there else ():
        if here[start : start + len(there)] == there:
            return range(start, start + len(there))
    return range(0)


def _gridded_leaves(parts: Sequence[Dim]) -> set[Axis]:
    """Axes to take for latents where none is known to reach the output.

    They are the tokens that range over several dimensions of one input.
    """
    found: dict[str, set[Axis]] = {}
    for part in parts:
        axes = leaves(part)
        origins = {leaf.origin for leaf in axes}
        dims = {(o.source, o.dim) for o in origins if o is not None and o.user and o.floating}
        if len(dims) == len(origins) > 1 and len({source for source, _ in dims}) == 1:
            found.setdefault(next(iter(dims))[0], set()).update(axes)
    return next(iter(found.values())) if len(found) == 1 else set()
