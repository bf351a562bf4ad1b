"""What the backend knows of a graph before it rewrites anything: facts, decisions, the order."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from dit_opt.decisions import GraphRecord, PassRecord
from dit_opt.facts.layouts import declare_grid
from dit_opt.facts.order import OrderRefusal, OrderRegion, find_order_region
from dit_opt.facts.sites import Site, find_sites
from dit_opt.facts.spans import Spans
from dit_opt.facts.timestep import find_timestep
from dit_opt.facts.token_ids import TokenIds, find_token_ids
from dit_opt.facts.tokens import Tokens, find_tokens
from dit_opt.options import OptionError, Options
from dit_opt.passes.choose_sites import Choice, choose_sites
from dit_opt.passes.plan_nodes import takes_cube_order
from dit_opt.passes.qk_prologue import describe_prologues
from dit_opt.passes.sparse_site import SparseSite

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Analysis:
    """The facts of one graph and what follows from them.

    Attributes:
        sites, tokens: the facts. choices: one for each site.
        timesteps: placeholder positions that may be the timestep.
        positions: the inputs whose values may tell the grid.
        order: where all tokens can be kept in one order, or why they cannot; None where no router
            asks for it.
        prologue: which queries and keys one kernel makes, in words.
    """

    sites: tuple[Site, ...]
    tokens: Tokens
    choices: tuple[Choice, ...]
    timesteps: tuple[int, ...]
    timestep_name: str | None
    order: OrderRegion | OrderRefusal | None
    prologue: str = ""
    positions: tuple[TokenIds, ...] = ()

    @property
    def sparse(self) -> tuple[SparseSite, ...]:
        return tuple(c.sparse for c in self.choices if c.sparse)

    def describe(self, passes: Sequence[PassRecord]) -> GraphRecord:
        """What reports show of it."""
        order = ""
        if isinstance(self.order, OrderRegion):
            count = len(self.order.entries) + len(self.order.tables) + len(self.order.exits)
            order = f"Tokens are ordered once for the whole graph, by {count} gathers."
        elif self.order is not None:
            order = f"Tokens are gathered at each attention call. {self.order}"
        return GraphRecord(
            decisions=tuple(c.decision for c in self.choices),
            timestep=self.timestep_name,
            order=order,
            prologue=self.prologue,
            passes=tuple(passes),
        )


def analyse(
    gm: GraphModule,
    options: Options,
    model_grid: tuple[int, int, int] | None = None,
    told: Mapping[int, Spans] | None = None,
    read: Callable[[TokenIds], Grid | None] | None = None,
) -> tuple[Analysis, list[PassRecord]]:
    """Facts and decisions of a graph; nothing is rewritten or compiled.

    `model_grid` is that of the whole model, where the graph is one of its blocks; `told`, by the
    position of inputs, how their tokens lie, where an earlier graph returned them; `read` gives the
    (T, H, W) that the values of an input tell.
    """
    passes: list[PassRecord] = []

    def timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        out = function(*args)
        passes.append(PassRecord(name, 0, time.perf_counter() - began))
        return out

    sites = timed("find_sites", find_sites, gm.graph)
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = {placeholders[i]: spans for i, spans in (told or {}).items()}
    tokens = timed("find_tokens", find_tokens, gm.graph, sites, given)
    places: Mapping[Node, tuple[TokenIds, ...]] = {}
    if read is not None and model_grid is None:
        places = timed("find_token_ids", find_token_ids, gm.graph, tokens, sites)
        tokens = _read_grids(tokens, places, read)
    timestep = timed("find_timestep", find_timestep, gm.graph)
    choices = timed("choose_sites", choose_sites, gm, sites, tokens, options, model_grid)
    order = timed("find_order", _find_order, gm, tokens, choices)
    candidates = () if timestep is None else timestep.candidates
    return (
        Analysis(
            sites=sites,
            tokens=tokens,
            choices=tuple(_mark_ordered(choices, order)),
            timesteps=tuple(placeholders.index(n) for n in candidates),
            timestep_name=None if timestep is None else timestep.candidates[0].name,
            order=order,
            prologue=timed("find_prologues", _find_prologues, choices) if options.fuse else "",
            positions=tuple(dict.fromkeys(itertools.chain.from_iterable(places.values()))),
        ),
        passes,
    )


def _read_grids(
    tokens: Tokens,
    places: Mapping[Node, tuple[TokenIds, ...]],
    read: Callable[[TokenIds], Grid | None],
) -> Tokens:
    """The tokens with the grids that their numbers tell, where all that tell any tell the same."""
    layouts = dict(tokens.layouts)
    for site, positions in places.items():
        found = {grid for grid in map(read, positions) if grid is not None}
        if len(found) == 1:
            layouts[site] = declare_grid(layouts[site], found.pop(), "positions")
    return dataclasses.replace(tokens, layouts=layouts)


def _find_order(
    gm: GraphModule, tokens: Tokens, choices: Sequence[Choice]
) -> OrderRegion | OrderRefusal | None:
    wanting = [
        (c.sparse.site, c.layout)
        for c in choices
        if c.sparse and c.layout and takes_cube_order(c.sparse.router)
    ]
    return find_order_region(gm.graph, tokens.labels, wanting) if wanting else None


def _find_prologues(choices: Sequence[Choice]) -> str:
    sites = [c.sparse for c in choices if c.sparse]
    refuse_processors(sites)
    return describe_prologues([sparse.site for sparse in sites]) if sites else ""


def refuse_processors(sites: Sequence[SparseSite]) -> None:
    """Raises OptionError where the kernel of `fuse` would have to run elsewhere than on a GPU."""
    for sparse in sites:
        if sparse.example.device.type != "cuda":
            raise OptionError(
                f"fuse=True makes queries and keys by a Triton kernel, but the attention of "
                f"{sparse.site.module or 'a site'} is on {sparse.example.device}, where Inductor "
                "does it; leave `fuse` out."
            )


def _mark_ordered(
    choices: Sequence[Choice], order: OrderRegion | OrderRefusal | None
) -> list[Choice]:
    if not isinstance(order, OrderRegion):
        return list(choices)
    return [
        dataclasses.replace(c, sparse=dataclasses.replace(c.sparse, ordered=True))
        if c.sparse and c.sparse.site.node in order.sites
        else c
        for c in choices
    ]
