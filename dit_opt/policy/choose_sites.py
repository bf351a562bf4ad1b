"""Decide for each attention site whether it is replaced, and why not.

One table of questions, asked in order; the first "no" is the reason. Nothing is rewritten here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Node

from dit_opt._compat import size_expression, size_hint
from dit_opt.decisions import AttentionReason, LayoutSummary, SiteDecision
from dit_opt.facts.anchors import find_layer_anchor
from dit_opt.facts.graph import Facts
from dit_opt.facts.layouts import Layout, SegmentKind, SiteKind, declare_grid
from dit_opt.facts.masks import Mask, MaskKind
from dit_opt.facts.nodes import example_of, tensor_of
from dit_opt.facts.sites import Site
from dit_opt.options import OptionError, Options
from dit_opt.policy import cost
from dit_opt.policy.given_grid import apply_grid
from dit_opt.policy.kernel_limits import find_limit
from dit_opt.policy.site_cost import predict_site
from dit_opt.policy.sparse_site import SparseSite
from dit_opt.routers import KEEP_ALL, find_router
from dit_opt.routers.base import BLOCK_K, Goal

# Rows that pick from fewer key blocks have little to choose from, however fast that is.
LEAST_BLOCKS = 16


@dataclass(frozen=True)
class Choice:
    """The verdict on one site: the decision for reports, and how to replace it (or None).

    `layout` is that of its tokens, with the grid that was given if none is proved.
    """

    decision: SiteDecision
    node: Node
    sparse: SparseSite | None
    layout: Layout | None


def find_choices(facts: Facts, options: Options) -> tuple[Choice, ...]:
    """One Choice per site, in graph order.

    Raises OptionError where a grid was given that fits no site, or where a router was asked for
    by name and can serve none of the sites, unless another graph gets the latents.
    """
    sites, tokens = facts.sites, facts.tokens
    layouts = [tokens.layouts.get(site.node) for site in sites]
    if options.grid is not None and not tokens.forwards_latents:
        layouts = apply_grid(options.grid, sites, layouts)
    if facts.hints.grid is not None:
        layouts = [layout and declare_grid(layout, facts.hints.grid, "model") for layout in layouts]
    knows_latents = any(layout and layout.latents for layout in layouts)
    choices = tuple(
        _judge(site, facts, layout, knows_latents, options)
        for site, layout in zip(sites, layouts, strict=True)
    )
    asked = options.router not in ("auto", "dense")
    if asked and sites and not tokens.forwards_latents and not any(c.sparse for c in choices):
        reasons = "; ".join(
            f"{c.decision.module or c.decision.site}: {c.decision.reason.name}"
            + (f" ({c.decision.detail})" if c.decision.detail else "")
            for c in choices[:4]
        )
        raise OptionError(
            f"router={options.router!r} was asked for but can serve none of the {len(sites)} "
            f"attention sites of this graph ({reasons}). Use router='auto' to leave such sites "
            "dense, or remove the cause."
        )
    return choices


def find_sparse_sites(facts: Facts, options: Options) -> tuple[SparseSite, ...]:
    """The sites to replace, as the graph has them now."""
    sites = {site.node: site for site in facts.sites}
    return tuple(
        dataclasses.replace(choice.sparse, site=sites[choice.node])
        for choice in facts.get(find_choices, facts, options)
        if choice.sparse is not None
    )


def mark_ordered(
    choices: Sequence[Choice], nodes: Sequence[Node], moved: Mapping[Node, Node]
) -> tuple[Choice, ...]:
    """The choices after tokens were put into the cube order.

    Args:
        nodes: the attention calls whose tokens are in the order.
        moved: what stands for a value in the order, where masks have to be read anew.
    """

    def mark(choice: Choice) -> Choice:
        sparse = choice.sparse
        if sparse is None:
            return choice
        mask = None if sparse.key_mask is None else moved.get(sparse.key_mask, sparse.key_mask)
        ordered = choice.node in nodes
        return dataclasses.replace(
            choice, sparse=dataclasses.replace(sparse, ordered=ordered, key_mask=mask)
        )

    return tuple(map(mark, choices))


def _judge(
    site: Site, facts: Facts, layout: Layout | None, knows_latents: bool, options: Options
) -> Choice:
    """`knows_latents`: some site of the graph tells which of its tokens are latents."""
    mask = facts.mask_of(site)
    reason, detail = _find_obstacle(site, mask, layout, knows_latents, options)
    keeps_all = options.density == 1
    prediction, least = None, options.min_tokens or 0
    if reason is AttentionReason.REPLACED and not keeps_all:
        prediction = predict_site(site, options)
        if options.min_tokens is None:
            # None where no number of tokens is worth it
            least = prediction.crossover and max(prediction.crossover, LEAST_BLOCKS * BLOCK_K)
    if reason is AttentionReason.REPLACED:
        reason, detail = _weigh_length(site, least, detail)
    sparse = None
    if reason is AttentionReason.REPLACED:
        assert layout is not None and least is not None
        sparse = _plan_site(site, facts, mask, layout, least, options)
    dense = cost.dense_flops(*_shape(site)) if site.query is not None else None
    kept = options.effective_density or cost.EXPECTED_DENSITY
    decision = SiteDecision(
        site=site.index,
        module=site.module,
        source=site.source,
        reason=reason,
        detail=detail,
        shapes=_describe_shapes(site),
        layout=_summarise_layout(layout),
        router=sparse.router.name if sparse else "",
        flops_dense=dense,
        flops_sparse=None if sparse is None or dense is None else dense * kept,
        gain=_predict_gain(site, prediction) if sparse else None,
        pays_from=prediction.crossover if prediction else None,
    )
    return Choice(decision, site.node, sparse, layout)


def _plan_site(
    site: Site, facts: Facts, mask: Mask, layout: Layout, least: int, options: Options
) -> SparseSite:
    """How a site is to be replaced."""
    latents = layout.latents
    router = KEEP_ALL if options.density == 1 else find_router(options.router)
    head_dim = int(example_of(site.query).shape[-1])
    grid = layout.grid if router.searches else None
    return SparseSite(
        site=site,
        router=router,
        goal=_find_goal(options),
        tail=options.tail,
        grid=None if grid is None else grid.sizes,
        start=sympy.Integer(0) if latents is None else sympy.sympify(latents.start),
        video=_length(site) if latents is None else sympy.sympify(latents.stop - latents.start),
        anchor=find_layer_anchor(site, facts.graph),
        ordered=False,
        key_mask=mask.keys,
        mask_queries=mask.kind is MaskKind.OUTER,
        scale=site.scale if site.scale is not None else head_dim**-0.5,
        min_tokens=least,
    )


def _find_goal(options: Options) -> Goal:
    density, quality = options.effective_density, options.effective_quality
    if density is not None:
        return Goal(density, by_density=True)
    assert quality is not None
    return Goal(quality, by_density=False)


def _find_obstacle(
    site: Site, mask: Mask, layout: Layout | None, knows_latents: bool, options: Options
) -> tuple[AttentionReason, str]:
    """The first reason against a site, or REPLACED."""
    if options.router == "dense":
        return AttentionReason.ROUTER_DENSE, ""
    if site.refusal is not None:
        return site.refusal, site.detail
    limit = find_limit(site, layout)
    if limit is not None:
        return limit
    if layout is None or layout.kind is SiteKind.UNKNOWN:
        return AttentionReason.UNKNOWN_TOKENS, layout.reason if layout else ""
    if layout.kind is SiteKind.CROSS:
        return AttentionReason.CROSS_ATTENTION, ""
    if _length(site) != _length(site, key=True):
        return AttentionReason.UNEQUAL_LENGTHS, f"{_length(site)} and {_length(site, key=True)}"
    if knows_latents and options.density != 1 and _is_text(layout):
        return AttentionReason.TEXT_ONLY, ""
    if mask.kind is MaskKind.OTHER:
        return AttentionReason.MASK_NOT_KEY_PADDING, ""
    if options.density == 1:
        return AttentionReason.REPLACED, ""
    # Text among the tokens would lose keys, and nothing would show it.
    if layout.latents is None:
        return AttentionReason.UNKNOWN_TOKENS, layout.reason
    if layout.grid is None and find_router(options.router).needs_grid:
        return AttentionReason.NO_GRID, layout.reason
    # Served in the model's own order; why there is no grid may still matter to the user.
    return AttentionReason.REPLACED, "" if layout.grid is not None else layout.reason


def _is_text(layout: Layout) -> bool:
    """Whether the tokens are text and what pads it, which no input gave."""
    kinds = {segment.kind for segment in layout.query}
    others = [s for s in layout.query if s.kind is SegmentKind.OTHER]
    return (
        SegmentKind.TEXT in kinds
        and SegmentKind.LATENTS not in kinds
        and all(segment.source is None for segment in others)
    )


def _weigh_length(site: Site, least: int | None, detail: str) -> tuple[AttentionReason, str]:
    """Whether a site that could be replaced should be; of unknown lengths each call is judged."""
    if least is None:
        return AttentionReason.NEVER_PAYS, ""
    if _fewer(_length(site), least):
        return AttentionReason.TOO_SHORT, f"{_length(site)} tokens of {least}"
    return AttentionReason.REPLACED, detail


def _predict_gain(site: Site, prediction: cost.Prediction | None) -> float | None:
    """At the length that the site was traced with."""
    tokens = size_hint(example_of(site.query).shape[-2])
    return None if prediction is None or tokens is None else prediction.gain(tokens)


def _shape(site: Site):
    """(batch * heads, queries, keys, head dim) as expressions."""
    q, k = (example_of(n).shape for n in (site.query, site.key))
    heads = math.prod(map(size_expression, q[:-2]), start=sympy.Integer(1))
    return heads, size_expression(q[-2]), size_expression(k[-2]), size_expression(q[-1])


def _length(site: Site, key: bool = False) -> sympy.Expr:
    return size_expression(example_of(site.key if key else site.query).shape[-2])


def _fewer(length: sympy.Expr, least: int) -> bool:
    """Whether a length is known to be below `least`; an unknown one is judged in each call."""
    return bool(length.is_Integer and length < least)


def _describe_shapes(site: Site) -> tuple[str, ...]:
    tensors = map(tensor_of, (site.query, site.key, site.value))
    return tuple(str(list(map(str, x.shape))).replace("'", "") for x in tensors if x is not None)


def _summarise_layout(layout: Layout | None) -> LayoutSummary | None:
    if layout is None:
        return None
    grid, source = layout.grid, ""
    if grid is not None:
        source = f"{grid.source}, one frame assumed" if grid.assumed else grid.source
    return LayoutSummary(
        kind=layout.kind.value,
        segments=tuple(f"{s.kind.value}[{s.start}:{s.stop}]" for s in layout.key),
        grid=None if grid is None else grid.sizes,
        grid_source=source,
        reason="" if grid is not None else layout.reason,
    )
