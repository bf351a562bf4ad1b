"""Token ids: the inputs whose values may give the grid of packed latents.

Some pipelines pass coordinates for each token (`img_ids`, `video_coords`). The graph proves which
coordinates belong to which tokens; their values are known only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import sympy
from torch.fx import Graph, Node

from dit_opt.facts.axes import segments, size
from dit_opt.facts.layouts import declare_grid
from dit_opt.facts.nodes import input_name, is_user_input, sizes_of
from dit_opt.facts.sites import Site
from dit_opt.facts.sizes import Grid, are_equal
from dit_opt.facts.timestep import feeds_layer
from dit_opt.facts.tokens import Tokens


class TokenIds(NamedTuple):
    """Where the ids of the latent tokens may be: `input.movedim(dim, 0)[start:stop]`.

    `argument` is the index of the input among the graph's placeholders.
    """

    argument: int
    dim: int
    start: int
    stop: int


def find_token_ids(
    graph: Graph, tokens: Tokens, sites: Sequence[Site]
) -> dict[Node, tuple[TokenIds, ...]]:
    """By `site.node`, the inputs that share the token axis of its latents or whole sequence.

    Only for sites without a grid and with static sizes. An input that feeds a linear layer holds
    features, as the latents themselves, and no ids.
    """
    placeholders = graph.find_nodes(op="placeholder")
    inputs = {
        input_name(n): (i, n)
        for i, n in enumerate(placeholders)
        if is_user_input(n) and not feeds_layer(n)
    }
    found: dict[Node, tuple[TokenIds, ...]] = {}
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
            if origin.source in inputs
            and (place := _locate(*inputs[origin.source], origin.dim, start, stop, total))
        )
        if places:
            found[site.node] = tuple(places)
    return found


def read_grids(
    tokens: Tokens,
    token_ids: Mapping[Node, Sequence[TokenIds]],
    read: Callable[[TokenIds], Grid | None],
) -> Tokens:
    """The tokens with the grids that their ids give; where ids of a site disagree, with none."""
    layouts = dict(tokens.layouts)
    for site, ids in token_ids.items():
        grids = {grid for grid in map(read, ids) if grid is not None}
        if len(grids) == 1:
            layouts[site] = declare_grid(layouts[site], grids.pop(), "positions")
    return replace(tokens, layouts=layouts)


def _locate(
    index: int, node: Node, dim: int, start: sympy.Expr, stop: sympy.Expr, total: sympy.Expr
) -> TokenIds | None:
    """The ids in an input that has one for each latent token, or for each token of the site."""
    length = sizes_of(node.meta["example_value"])[dim]
    if are_equal(length, stop - start):
        return TokenIds(index, dim, 0, int(length))
    return TokenIds(index, dim, int(start), int(stop)) if are_equal(length, total) else None
