"""Facts: what is known of one graph, worked out on first use and dropped by an edit.

A fact is the result of a pure function. `Facts.get` caches it by the function and what it is about:

    facts.get(find_timestep)              # find_timestep(graph)
    facts.get(classify_mask, site)        # a fact of one site
    facts.get(find_something, facts)      # a fact that is read from other facts

so a new fact needs no edit here. Its name is that of its function without the verb: "timestep",
"mask", "something". Passes name the facts that are still true after them by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch.fx import Graph, GraphModule, Node

from dit_opt.facts.masks import Mask, classify_mask
from dit_opt.facts.sites import Site, find_sites
from dit_opt.facts.sizes import Grid
from dit_opt.facts.spans import Spans
from dit_opt.facts.timestep import Timestep, find_timestep
from dit_opt.facts.token_ids import TokenIds, find_token_ids, read_grids
from dit_opt.facts.tokens import Tokens, find_tokens

T = TypeVar("T")


@dataclass(frozen=True)
class InputHints:
    """What is known of a graph's inputs from outside of the graph.

    Attributes:
        spans: by index of the placeholder, how its tokens lie, where an earlier graph returned it.
        read_grid: the (T, H, W) that the values of token ids give, or None; without it, no ids are
            read.
        grid: (T, H, W) of the whole model, where the graph is one of its blocks.
    """

    spans: Mapping[int, Spans] = field(default_factory=dict)
    read_grid: Callable[[TokenIds], Grid | None] | None = None
    grid: Grid | None = None


class Facts:
    """The facts of a graph module. They hold nodes of it, so an edit must `drop` them."""

    def __init__(self, gm: GraphModule, hints: InputHints | None = None) -> None:
        self.gm = gm
        self.hints = hints or InputHints()
        self._known: dict[tuple[Callable[..., Any], tuple[Any, ...]], Any] = {}

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    def get(self, function: Callable[..., T], *about: Any) -> T:
        """`function(*about)`, or `function(graph)` where nothing else is given; computed once."""
        key = function, about
        if key not in self._known:
            self._known[key] = function(*(about or (self.graph,)))
        return self._known[key]

    def put(self, value: Any, function: Callable[..., Any], *about: Any) -> None:
        """Replace a fact by what it is after an edit, which the editing pass knows."""
        self._known[function, about] = value

    def drop(self, keep: frozenset[str] = frozenset()) -> None:
        """Forget all facts but those with the given names."""
        self._known = {k: fact for k, fact in self._known.items() if name_fact(k[0]) in keep}

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every attention call."""
        return self.get(find_sites)

    @property
    def tokens(self) -> Tokens:
        """The token layout of every site, with the grids that token ids give."""
        return self.get(_read_tokens, self)

    @property
    def token_ids(self) -> dict[Node, tuple[TokenIds, ...]]:
        """By `site.node`, the inputs whose values may give a grid that the graph does not prove."""
        return self.get(_find_token_ids, self)

    @property
    def timestep(self) -> Timestep | None:
        """The inputs that may be the timestep."""
        return self.get(find_timestep)

    def mask_of(self, site: Site) -> Mask:
        """What the mask of a site depends on."""
        return self.get(classify_mask, site)


def name_fact(function: Callable[..., Any]) -> str:
    """The name of the fact that a function finds: its own without the verb."""
    _, _, name = function.__name__.lstrip("_").partition("_")
    return name


def _find_graph_tokens(facts: Facts) -> Tokens:
    """The tokens as the graph and the spans of its inputs prove them."""
    placeholders = facts.graph.find_nodes(op="placeholder")
    spans = {placeholders[i]: spans for i, spans in facts.hints.spans.items()}
    return find_tokens(facts.graph, facts.sites, spans)


def _find_token_ids(facts: Facts) -> dict[Node, tuple[TokenIds, ...]]:
    return find_token_ids(facts.graph, facts.get(_find_graph_tokens, facts), facts.sites)


def _read_tokens(facts: Facts) -> Tokens:
    tokens, read = facts.get(_find_graph_tokens, facts), facts.hints.read_grid
    return tokens if read is None else read_grids(tokens, facts.token_ids, read)
