"""One attention site that is to be replaced, and how."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from dit_opt._compat import size_expression
from dit_opt.facts.sites import Site
from dit_opt.routers.base import Goal, Router


@dataclass(frozen=True)
class SparseSite:
    """One site to replace.

    Attributes:
        site: the attention call.
        router, goal: how its blocks are chosen, and what is aimed at.
        tail: as in `Options`.
        grid: (T, H, W) of the latent tokens, or None where it is not known.
        start: where the latent tokens start in the site's sequence. video: how many there are.
        anchor: placeholder of a parameter that only this site's layer has, or None.
        ordered: its tokens stand in the cube order already, text where it was.
        key_mask: node of a key-padding mask whose last dimension is the keys, or None.
        mask_queries: rows of masked tokens see no key either, and attend to nothing.
        scale: factor of the scores.
        min_tokens: the least tokens of a call that is worth it.
    """

    site: Site
    router: Router
    goal: Goal
    tail: str
    grid: tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None
    start: sympy.Expr
    video: sympy.Expr
    anchor: Node | None
    ordered: bool
    key_mask: Node | None
    mask_queries: bool
    scale: float
    min_tokens: int

    @property
    def qkv(self) -> tuple[Node, Node, Node]:
        """Query, key and value; a site that hides them is never replaced."""
        site = self.site
        assert site.query is not None and site.key is not None and site.value is not None
        return site.query, site.key, site.value

    @property
    def example(self) -> torch.Tensor:
        """The query as Dynamo traced it, `[B, H, N, D]` or `[B * H, N, D]`."""
        return self.qkv[0].meta["example_value"]

    @property
    def tokens(self) -> sympy.Expr:
        """The number of tokens of a call."""
        return size_expression(self.example.shape[-2])

    @property
    def layout(self) -> tuple[sympy.Expr, ...]:
        """(T, H, W, start, N); without a grid, the tokens are one row."""
        grid = self.grid or (sympy.Integer(1), sympy.Integer(1), self.video)
        return (*grid, self.start, self.tokens)
