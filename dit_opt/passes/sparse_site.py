"""What `sparse_attention` is asked to write: the sites, and the variant of the graph."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from dit_opt.facts.sites import Site

# queries need 128 rows a tile (L2 bandwidth on GPUs); keys may be finer
BLOCK_Q = 128
BLOCK_K = 64

# What the guard lets a plan keep less than it did when it was made, or than was asked for.
SLACK = 0.05


@dataclass(frozen=True)
class SparseForm:
    """Which sparse variant of a graph to write.

    Attributes:
        reuse: plans are inputs, instead of being searched.
        guard: a few rows of each plan are checked before it is used. A search then takes how much
            more each head is to keep, float32 `[B, H]`; a reused plan comes with what it kept.
        compare: dense attention runs beside, for its difference.
        boosted: some variant of the graph has the guard, so that a search may have been told to
            keep more of a head.
        asks: an input says in each call whether it searches or takes the plan that is an input,
            too. Its outputs are those of a search.
    """

    reuse: bool = False
    guard: bool = False
    compare: bool = False
    boosted: bool = False
    asks: bool = False

    def name_outputs(self, plan_tensors: int) -> tuple[str, ...]:
        """What each searching site adds to the graph's outputs, in order."""
        names: tuple[str, ...] = ()
        if not self.reuse:
            names += ("plan",) * plan_tensors + ("recall", "density")
        if self.guard:
            names += ("kept", "error", "caught")
        return names + (("difference",) if self.compare else ())


@dataclass(frozen=True)
class SparseSite:
    """One site to replace.

    Attributes:
        site: the attention call.
        router: as in `Options`, or "full" for every block in the graph's own order.
        tail: as in `Options`.
        grid: (T, H, W) of the latent tokens, or None where it is not known.
        start: where the latent tokens start in the site's sequence. video: how many there are.
        ordered: they stand in the cube order already, text where it was.
        key_mask: node of a key-padding mask whose last dimension is the keys, or None.
        mask_queries: rows of masked tokens see no key either, and attend to nothing.
        scale: factor of the scores.
        target: softmax mass to keep per head, or the density to stay under.
        by_density: which of the two `target` is.
        min_tokens: the least tokens of a call that is worth it.
    """

    site: Site
    router: str
    tail: str
    grid: tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None
    start: sympy.Expr
    video: sympy.Expr
    ordered: bool
    key_mask: Node | None
    mask_queries: bool
    scale: float
    target: float
    by_density: bool
    min_tokens: int

    @property
    def example(self) -> torch.Tensor:
        """The query as Dynamo traced it, `[B, H, N, D]` or `[B * H, N, D]`."""
        assert self.site.query is not None
        return self.site.query.meta["example_value"]
