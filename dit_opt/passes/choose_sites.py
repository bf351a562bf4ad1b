"""Decide for each attention site whether it is replaced, and why not.

One table of questions, asked in order; the first "no" is the reason. Nothing is rewritten here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx import GraphModule

from dit_opt import cost
from dit_opt._compat import size_expression, size_hint
from dit_opt.decisions import Decision, LayoutSummary, Reason
from dit_opt.facts.layouts import Layout, SegmentKind, SiteKind, TokenGrid, declare_grid
from dit_opt.facts.masks import MaskKind, classify_mask
from dit_opt.facts.sites import Site
from dit_opt.facts.tokens import Tokens
from dit_opt.options import OptionError, Options
from dit_opt.passes.given_grid import apply_grid
from dit_opt.passes.kernel_limits import find_limit
from dit_opt.passes.site_cost import predict_site
from dit_opt.passes.sparse_site import BLOCK_K, SparseSite

# Routers whose patterns are made of frames, rows and columns.
GRID_ROUTERS = ("rainfusion", "frame_tile")
# Rows that pick from fewer key blocks have little to choose from, however fast that is.
LEAST_BLOCKS = 16


@dataclass(frozen=True)
class Choice:
    """The verdict on one site: the decision for reports, and how to replace it (or None).

    `layout` is that of its tokens, with the grid that was given if none is proved.
    """

    decision: Decision
    sparse: SparseSite | None
    layout: Layout | None


def choose_sites(
    gm: GraphModule,
    sites: Sequence[Site],
    tokens: Tokens,
    options: Options,
    model_grid: tuple[int, int, int] | None = None,
) -> list[Choice]:
    """One Choice per site.

    `model_grid` is what the whole model tells of a graph that is one of its blocks.

    Raises OptionError where a grid was given that fits no site, or where a router was asked for
    by name and can serve none of the sites, unless another graph gets the latents.
    """
    layouts = [tokens.layouts.get(site.node) for site in sites]
    if options.grid is not None and not tokens.forwards_latents:
        layouts = apply_grid(options.grid, sites, layouts)
    if model_grid is not None:
        layouts = [layout and declare_grid(layout, model_grid, "model") for layout in layouts]
    told = any(layout and layout.latents for layout in layouts)
    choices = [
        _judge(site, layout, told, options) for site, layout in zip(sites, layouts, strict=True)
    ]
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


def _judge(site: Site, layout: Layout | None, told: bool, options: Options) -> Choice:
    """`told`: some site of the graph tells which of its tokens are latents."""
    reason, detail = _find_obstacle(site, layout, told, options)
    kind, keys = classify_mask(site)
    grid = layout.grid if layout else None
    dense = cost.dense_flops(*_shape(site)) if site.query is not None else None
    router = "full" if options.density == 1 else options.effective_router
    prediction, least = None, options.min_tokens or 0
    if reason is Reason.REPLACED and router != "full":
        prediction = predict_site(site, options)
        if options.min_tokens is None:
            least = _choose_least(prediction)
    if reason is Reason.REPLACED:
        reason, detail = _weigh_length(site, least, detail)
    sparse = None
    if reason is Reason.REPLACED:
        assert layout is not None
        latents = layout.latents
        head_dim = int(site.query.meta["example_value"].shape[-1])
        sparse = SparseSite(
            site=site,
            router=router,
            tail=options.tail,
            grid=None if router == "full" or grid is None else grid.sizes,
            start=sympy.Integer(0) if latents is None else sympy.sympify(latents.start),
            video=_length(site) if latents is None else sympy.sympify(latents.stop - latents.start),
            ordered=False,
            key_mask=keys,
            mask_queries=kind is MaskKind.OUTER,
            scale=site.scale if site.scale is not None else head_dim**-0.5,
            target=options.effective_density or options.effective_quality,
            by_density=options.effective_density is not None,
            min_tokens=least,
        )
    kept = options.effective_density or cost.EXPECTED_DENSITY
    return Choice(
        Decision(
            site=site.index,
            module=site.module,
            source=site.source,
            reason=reason,
            detail=detail,
            shapes=_describe_shapes(site),
            layout=_summarise_layout(layout, grid),
            router=router if sparse else "",
            flops_dense=dense,
            flops_sparse=None if sparse is None or dense is None else dense * kept,
            gain=_predict_gain(site, prediction) if sparse else None,
            pays_from=prediction.crossover if prediction else None,
        ),
        sparse,
        layout,
    )


def _find_obstacle(
    site: Site, layout: Layout | None, told: bool, options: Options
) -> tuple[Reason, str]:
    """The first reason against a site, or REPLACED."""
    if options.router == "dense":
        return Reason.ROUTER_DENSE, ""
    if site.refusal is not None:
        return site.refusal, site.detail
    limit = find_limit(site, layout)
    if limit is not None:
        return limit
    if layout is None or layout.kind is SiteKind.UNKNOWN:
        return Reason.UNKNOWN_TOKENS, layout.reason if layout else ""
    if layout.kind is SiteKind.CROSS:
        return Reason.CROSS_ATTENTION, ""
    if _length(site) != _length(site, key=True):
        return Reason.UNEQUAL_LENGTHS, f"{_length(site)} and {_length(site, key=True)}"
    if told and options.density != 1 and _is_text(layout):
        return Reason.TEXT_ONLY, ""
    if classify_mask(site).kind is MaskKind.OTHER:
        return Reason.MASK_NOT_KEY_PADDING, ""
    if options.density == 1:
        return Reason.REPLACED, ""
    # Text among the tokens would lose keys, and nothing would show it.
    if layout.latents is None:
        return Reason.UNKNOWN_TOKENS, layout.reason
    if layout.grid is None and options.effective_router in GRID_ROUTERS:
        return Reason.NO_GRID, layout.reason
    # Served in the model's own order; why there is no grid may still matter to the user.
    return Reason.REPLACED, "" if layout.grid is not None else layout.reason


def _is_text(layout: Layout) -> bool:
    """Whether the tokens are text and what pads it, which no input gave."""
    kinds = {segment.kind for segment in layout.query}
    others = [s for s in layout.query if s.kind is SegmentKind.OTHER]
    return (
        SegmentKind.TEXT in kinds
        and SegmentKind.LATENTS not in kinds
        and all(segment.source is None for segment in others)
    )


def _choose_least(prediction: cost.Prediction) -> int | None:
    """The least tokens that are worth it; None where no number is."""
    crossover = prediction.crossover
    return None if crossover is None else max(crossover, LEAST_BLOCKS * BLOCK_K)


def _weigh_length(site: Site, least: int | None, detail: str) -> tuple[Reason, str]:
    """Whether a site that could be replaced should be; of unknown lengths each call is judged."""
    if least is None:
        return Reason.NEVER_PAYS, ""
    if _fewer(_length(site), least):
        return Reason.TOO_SHORT, f"{_length(site)} tokens of {least}"
    return Reason.REPLACED, detail


def _predict_gain(site: Site, prediction: cost.Prediction | None) -> float | None:
    """At the length that the site was traced with."""
    assert site.query is not None
    tokens = size_hint(site.query.meta["example_value"].shape[-2])
    return None if prediction is None or tokens is None else prediction.gain(tokens)


def _shape(site: Site):
    """(batch * heads, queries, keys, head dim) as expressions."""
    q, k = (n.meta["example_value"].shape for n in (site.query, site.key))
    heads = sympy.Integer(1)
    for size in q[:-2]:
        heads *= size_expression(size)
    return heads, size_expression(q[-2]), size_expression(k[-2]), size_expression(q[-1])


def _length(site: Site, key: bool = False) -> sympy.Expr:
    node = site.key if key else site.query
    return size_expression(node.meta["example_value"].shape[-2])


def _fewer(length: sympy.Expr, least: int) -> bool:
    """Whether a length is known to be below `least`; an unknown one is judged in each call."""
    return bool(length.is_Integer and length < least)


def _describe_shapes(site: Site) -> tuple[str, ...]:
    nodes = (site.query, site.key, site.value)
    return tuple(
        str(list(map(str, n.meta["example_value"].shape))).replace("'", "")
        for n in nodes
        if n is not None and isinstance(n.meta.get("example_value"), torch.Tensor)
    )


def _summarise_layout(layout: Layout | None, grid: TokenGrid | None) -> LayoutSummary | None:
    if layout is None:
        return None
    return LayoutSummary(
        kind=layout.kind.value,
        segments=tuple(f"{s.kind.value}[{s.start}:{s.stop}]" for s in layout.key),
        grid=None if grid is None else tuple(grid.sizes),
        grid_source=_name_source(grid),
        reason="" if grid is not None else layout.reason,
    )


def _name_source(grid: TokenGrid | None) -> str:
    if grid is None:
        return ""
    return f"{grid.source}, one frame assumed" if grid.assumed else grid.source
