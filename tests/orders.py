"""Helpers for tests of token orders: small functions as graphs, and runs in a random order."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from dit_opt.facts.layouts import declare_grid
from dit_opt.facts.order import OrderRegion, TokenEdge, find_order_region
from dit_opt.facts.sites import find_sites
from dit_opt.facts.tokens import find_tokens
from dit_opt.passes.token_order import order_tokens
from dit_opt.program.edit import append_placeholder, copy_graph

GRID = (2, 3, 5)
N = 30
CHANNELS = 4


class _Recorder(torch.fx.Interpreter):
    """Writes real values where Dynamo writes fake ones; much faster than a capture by Dynamo."""

    def run_node(self, n):
        n.meta["example_value"] = value = super().run_node(n)
        return value


def trace(function, *inputs) -> GraphModule:
    """A function of tensors as a graph; its parameters' names are those of the inputs."""
    gm = torch.fx.symbolic_trace(function)
    _Recorder(gm).run(*(x.clone() for x in inputs))
    return gm


def randn(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def latents() -> torch.Tensor:
    return randn(1, CHANNELS, *GRID)


def patchify(x):
    """[1, C, T, H, W] -> [1, N, C]"""
    return x.flatten(2).transpose(1, 2)


def unpatchify(tokens):
    return tokens.transpose(1, 2).reshape(1, CHANNELS, *GRID)


def attend(q, k=None, **kwargs):
    """[1, N, C] -> [1, N, C] by one head."""
    k = q if k is None else k
    return F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None], **kwargs)[:, 0]


def find_region(gm: GraphModule, grid=None, only=None):
    """What `find_order_region` says of all attention calls of a graph, or of those in `only`."""
    sites = [s for s in find_sites(gm.graph) if only is None or s.index in only]
    tokens = find_tokens(gm.graph, sites)
    layouts = [tokens.layouts[s.node] for s in sites]
    if grid is not None:
        layouts = [declare_grid(layout, grid) for layout in layouts]
    return find_order_region(gm.graph, tokens.labels, list(zip(sites, layouts, strict=True)))


def apply_order(gm: GraphModule, region: OrderRegion) -> tuple[GraphModule, int]:
    """A copy of the graph that runs in the order that its last two inputs give."""
    copy = copy_graph(gm)
    example = next(
        value
        for n in copy.graph.find_nodes(op="placeholder")
        if isinstance(value := n.meta["example_value"], torch.Tensor)
    )
    # Nobody reads the size of an order from its example, so a symbolic one need not be made.
    length = int(region.length) if region.length.is_Integer else 1
    order, inverse = (
        append_placeholder(copy, name, example.new_empty(length, dtype=torch.int64))
        for name in ("order", "inverse")
    )
    moved = move_region(region, {n.name: n for n in copy.graph.nodes})
    count = len(order_tokens(copy, moved, order, inverse))
    copy.recompile()
    return copy, count


def move_region(region: OrderRegion, at: dict[str, Node]) -> OrderRegion:
    """The same region in a copy of its graph; `at`: the nodes of the copy by name."""

    def move(edge: TokenEdge) -> TokenEdge:
        users = tuple(at[user.name] for user in edge.users)
        return replace(edge, node=at[edge.node.name], users=users)

    return replace(
        region,
        entries=tuple(map(move, region.entries)),
        tables=tuple(map(move, region.tables)),
        exits=tuple(map(move, region.exits)),
        sites=tuple(at[node.name] for node in region.sites),
    )


def random_order(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7))
    return order, torch.argsort(order)
