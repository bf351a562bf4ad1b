"""Positions: the inputs whose values may tell the grid of packed latents.

Some pipelines number the tokens themselves (`img_ids`, `video_coords`). The graph proves which
numbers belong to which tokens; what they say, only a call can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sympy
from torch.fx import Graph, Node

from dit_opt.facts.axes import segments, size
from dit_opt.facts.nodes import origin_of, sizes_of
from dit_opt.facts.provenance import feeds_layer
from dit_opt.facts.sites import Site
from dit_opt.facts.sizes import are_equal
from dit_opt.facts.tokens import Tokens

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
    graph: Graph, tokens: Tokens, sites: Sequence[Site]
) -> dict[Node, tuple[Positions, ...]]:
    """By `site.node`, the inputs that share the axis of its latents, or of its whole sequence.

    Of sites without a grid, and of sizes that are the same in each call; under dynamic shapes there
    are none. What a linear layer reads are features, as the latents themselves, and no numbers.
    """
    placeholders = graph.find_nodes(op="placeholder")
    given = {
        origin_of(n)[0]: (i, n)
        for i, n in enumerate(placeholders)
        if origin_of(n)[1] and not feeds_layer(n)
    }
    found: dict[Node, tuple[Positions, ...]] = {}
    for site in sites:
        layout = tokens.layouts[site.node]
        # latents imply that the queries have labels
        if layout.grid is not None or layout.latents is None or site.query is None:
            continue
        dim = tokens.labels[site.query][-2]
        parts, total = segments(dim), size(dim)
        start, stop = layout.latents.start, layout.latents.stop
        if len(parts) != len(layout.query) or not all(n.is_Integer for n in (start, stop, total)):
            continue
        latents = parts[layout.query.index(layout.latents)]
        places = dict.fromkeys(
            place
            for axis in latents
            for origin in axis.origins
            if origin.source in given
            and (place := _locate(*given[origin.source], origin.dim, start, stop, total))
        )
        if places:
            found[site.node] = tuple(places)
    return found


def _locate(
    index: int, node: Node, dim: int, start: sympy.Expr, stop: sympy.Expr, total: sympy.Expr
) -> Positions | None:
    """The place in an input that has a number for each latent token, or for each one of all."""
    length = sizes_of(node.meta["example_value"])[dim]
    if are_equal(length, stop - start):
        return Positions(index, dim, 0, int(length))
    return Positions(index, dim, int(start), int(stop)) if are_equal(length, total) else None
