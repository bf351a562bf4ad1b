"""Positions: the inputs whose values may tell the grid of packed latents.

Some pipelines number the tokens themselves (`img_ids`, `video_coords`). The graph proves which
numbers belong to which tokens; what they say, only a call can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.fx import Graph

from dit_opt.facts.axes import segments, size
from dit_opt.facts.labels import Labels, NoRule
from dit_opt.facts.layouts import Layout, SegmentKind
from dit_opt.facts.nodes import origin_of, sizes_of
from dit_opt.facts.provenance import feeds_layer
from dit_opt.facts.sites import Site
from dit_opt.facts.sizes import are_equal

__all__ = ["Positions", "find_positions"]


class Positions(NamedTuple):
    """Where the numbers of the latent tokens may stand: `input.movedim(dim, 0)[start:stop]`.

    `index` is that of the input among the graph's placeholders.
    """

    index: int
    dim: int
    start: int
    stop: int


def find_positions(
    graph: Graph, labels: Labels, sites: Sequence[tuple[Site, Layout]]
) -> tuple[Positions, ...]:
    """The inputs that share the axis of latents without a grid, or that of the whole sequence.

    Of sizes that are the same in each call; under dynamic shapes there are none. What a linear
    layer reads are features, as the latents themselves, and no numbers.
    """
    placeholders = graph.find_nodes(op="placeholder")
    given = {
        origin_of(n)[0]: (i, n)
        for i, n in enumerate(placeholders)
        if origin_of(n)[1] and not feeds_layer(n)
    }
    found: dict[Positions, None] = {}
    for site, layout in sites:
        if layout.grid is not None or layout.latents is None or site.query is None:
            continue
        try:
            dim = labels[site.query][-2]
        except NoRule:
            continue
        parts, total = segments(dim), size(dim)
        places = [i for i, s in enumerate(layout.query) if s.kind is SegmentKind.LATENTS]
        ends = layout.latents.start, layout.latents.stop
        if len(parts) != len(layout.query) or not all(n.is_Integer for n in (*ends, total)):
            continue
        start, stop = map(int, ends)
        for axis in parts[places[0]]:
            for origin in axis.origins:
                if origin.source not in given:
                    continue
                index, node = given[origin.source]
                length = sizes_of(node.meta["example_value"])[origin.dim]
                if are_equal(length, ends[1] - ends[0]):
                    found[Positions(index, origin.dim, 0, stop - start)] = None
                elif are_equal(length, total):
                    found[Positions(index, origin.dim, start, stop)] = None
    return tuple(found)
