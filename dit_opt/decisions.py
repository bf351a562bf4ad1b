"""What was decided about every place and why, as data.

Reports, JSON and asserts are all made of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique
from typing import Any

import sympy

Size = int | sympy.Expr


class Reason(Enum):
    """Why a place was changed or left alone: a sentence and, where there is one, a way out.

    The base of one family for each pass. The member of a family whose name is in `ACCEPTED` says
    that the place was changed.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return " ".join(filter(None, (self.message, self.remedy)))


ACCEPTED = ("REPLACED", "REWRITTEN")


@unique
class AttentionReason(Reason):
    """Why an attention site was replaced or left alone."""

    REPLACED = ("Replaced by block-sparse attention.", "")
    CROSS_ATTENTION = (
        "Its keys hold none of the latent tokens (cross-attention): there is little to skip.",
        "",
    )
    UNEQUAL_LENGTHS = (
        "Its keys hold more tokens than its queries, as where only latents attend to themselves "
        "and to text; plans are made for as many of both.",
        "Let the text query, too, and drop its rows of the result.",
    )
    TOO_SHORT = (
        "It has fewer keys than the sparse kernel needs to win.",
        "Set min_tokens lower to replace it nevertheless.",
    )
    NEVER_PAYS = (
        "Block-sparse attention and its search are not predicted to be faster, at any length.",
        "Lower density or raise refresh_every, or set min_tokens to replace it nevertheless.",
    )
    ROUTER_DENSE = ("router='dense' leaves every site alone.", "Choose router='auto'.")
    CAUSAL = ("It is causal; the routers assume that every query may see every key.", "")
    DROPOUT = ("It drops attention weights at random.", "Put the model in eval mode.")
    MASK_NOT_KEY_PADDING = (
        "Its mask is more than a key-padding mask, as far as the graph proves.",
        "Pass the mask as [B, 1, 1, N], or none where nothing is padded.",
    )
    NO_GRID = (
        "The graph does not tell the latent grid (T, H, W), and the router needs it.",
        'Pass options={"grid": (T, H, W)}, in tokens.',
    )
    UNKNOWN_TOKENS = (
        "The graph does not tell which of its tokens are latents.",
        'Pass options={"grid": (T, H, W)}, in tokens.',
    )
    TEXT_ONLY = (
        "Its tokens stem from another input than the latents (text), and such tokens stay dense.",
        "",
    )
    UNSUPPORTED_DTYPE = (
        "The sparse kernel takes float32, float16 and bfloat16 only.",
        "Convert the model with model.to(dtype).",
    )
    UNSUPPORTED_HEAD_DIM = (
        "The sparse kernel does not take this head dimension, or none that changes from call to "
        "call, or not one for keys and another for values.",
        "",
    )
    UNSUPPORTED_SHAPE = (
        "Its query, key and value are not all [B, H, N, D] or [B, N, D] with one B, or their "
        "number of heads differs without enable_gqa or by no whole factor.",
        "",
    )
    UNSUPPORTED_SCALE = (
        "The sparse kernel takes positive scales only.",
        "Move the sign of the scale into the query.",
    )
    UNSUPPORTED_SIZE = (
        "One of its sizes is known only once the graph runs: no input has it.",
        "Pass tensors that have this size, instead of cutting them by .item() or a boolean mask.",
    )
    DYNAMIC_SCALE = ("Its scale is computed in the graph.", "Pass the scale as a number.")
    PINNED_BACKEND = (
        "torch.nn.attention.sdpa_kernel pins its kernel.",
        "Remove the sdpa_kernel context to let ditopt choose.",
    )
    SHARED_INTERMEDIATE = (
        "Its scores or weights are also used elsewhere, or written in place.",
        "Do not return the attention weights.",
    )
    UNREADABLE_SCORES = (
        "Its scores pass through an operation that is no scale and no additive mask.",
        "Call torch.nn.functional.scaled_dot_product_attention instead.",
    )
    OPAQUE_MHA = (
        "torch.nn.MultiheadAttention hides its projections and its attention in one call.",
        "Call torch.nn.functional.scaled_dot_product_attention on projected tensors.",
    )
    FLEX = (
        "flex_attention brings a block mask and score function of its own.",
        "Call torch.nn.functional.scaled_dot_product_attention instead.",
    )
    INSIDE_REGION = (
        "It stands in a region that is compiled by itself: torch.cond, torch.utils.checkpoint or "
        "torch.compiler.nested_compile_region.",
        "Call the module without the region.",
    )
    FOREIGN_OP = (
        "A custom attention op computes it.",
        'With diffusers, call model.set_attention_backend("native").',
    )


@unique
class RewriteReason(Reason):
    """Why a place was rewritten or left alone, for passes whose reasons are told in words."""

    REWRITTEN = ("Rewritten.",)
    STAYS_DENSE = ("Its attention stays dense.",)
    NOT_PROVED = ("The graph does not prove that it may be rewritten.",)


@dataclass(frozen=True)
class LayoutSummary:
    """What is known about the tokens of a site, in words.

    Attributes:
        kind: "self", "joint", "cross" or "unknown".
        segments: of the keys, as "latents[0:60]".
        grid: (T, H, W) in tokens, or None.
        grid_source: "latents", "tables", "tables, one frame assumed", "option", "model" or
            "positions"; "" without a grid.
        reason: why there is no grid; "" where there is one.
    """

    kind: str
    segments: tuple[str, ...] = ()
    grid: tuple[Size, Size, Size] | None = None
    grid_source: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """What was decided about one place of a graph.

    Attributes:
        module: name of the module that it is in, as "blocks.0.attn1".
        source: file and line in the model, as "transformer_wan.py:214".
        reason: why; `detail` adds what only this place can tell.
    """

    module: str
    source: str
    reason: Reason
    detail: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the pass changes the place."""
        return self.reason.name in ACCEPTED

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that `json.dumps` takes."""
        return {
            "module": self.module,
            "source": self.source,
            "accepted": self.accepted,
            "reason": self.reason.name,
            "message": str(self.reason),
            "detail": self.detail,
        }


@dataclass(frozen=True)
class SiteDecision(Decision):
    """What was decided about one attention site.

    Attributes:
        site: number of the site in its graph.
        shapes: (query, key), each as "[1, 12, s0, 128]".
        layout: what is known about its tokens, or None.
        router: name of the router, "" where the site was left alone.
        flops_dense, flops_sparse: of one call; expressions under dynamic shapes.
        gain: predicted time of dense attention over that of sparse, as traced; None where unknown.
        pays_from: tokens from which on sparse attention is predicted to be faster, or None.
    """

    site: int = 0
    shapes: tuple[str, ...] = ()
    layout: LayoutSummary | None = None
    router: str = ""
    flops_dense: Size | None = None
    flops_sparse: Size | None = None
    gain: float | None = None
    pays_from: int | None = None

    @property
    def replaced(self) -> bool:
        """Whether the site now runs block-sparse attention."""
        return self.accepted

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that `json.dumps` takes; expressions as text."""
        layout = self.layout
        return {
            **super().to_json(),
            "replaced": self.replaced,
            "site": self.site,
            "shapes": list(self.shapes),
            "layout": None
            if layout is None
            else {
                "kind": layout.kind,
                "segments": list(layout.segments),
                "grid": None if layout.grid is None else [_plain(s) for s in layout.grid],
                "grid_source": layout.grid_source,
                "reason": layout.reason,
            },
            "router": self.router,
            "flops_dense": _plain(self.flops_dense),
            "flops_sparse": _plain(self.flops_sparse),
            "gain": self.gain,
            "pays_from": self.pays_from,
        }


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass.

    Attributes:
        name: of the pass. changed: how many places it changes. seconds: that it took, without the
            variants that are made of the graph later.
        decisions: one for every place that it looked at, in graph order.
        summary: what reports say of it, in a sentence, or "".
    """

    name: str
    changed: int
    seconds: float
    decisions: tuple[Decision, ...] = ()
    summary: str = ""

    def to_json(self) -> dict[str, Any]:
        """In types that `json.dumps` takes; decisions about attention sites are the graph's."""
        return {
            "name": self.name,
            "changed": self.changed,
            "seconds": self.seconds,
            "summary": self.summary,
            "decisions": [d.to_json() for d in self.decisions if not isinstance(d, SiteDecision)],
        }


@dataclass(frozen=True)
class GraphRecord:
    """Everything that was decided about one graph.

    Attributes:
        passes: one record for each pass that ran, in their order.
        timestep: name of the input that tells the step, or None.
    """

    passes: tuple[PassRecord, ...] = ()
    timestep: str | None = None

    @property
    def decisions(self) -> tuple[SiteDecision, ...]:
        """What was decided about each attention site, in graph order."""
        every = (d for record in self.passes for d in record.decisions)
        return tuple(d for d in every if isinstance(d, SiteDecision))

    @property
    def replaced(self) -> tuple[SiteDecision, ...]:
        """The decisions of replaced sites."""
        return tuple(d for d in self.decisions if d.replaced)

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that `json.dumps` takes."""
        return {
            "timestep": self.timestep,
            "decisions": [d.to_json() for d in self.decisions],
            "passes": [record.to_json() for record in self.passes],
        }


def _plain(size: Size | None) -> int | str | None:
    """A number where it is one, the text of the expression else."""
    if size is None or isinstance(size, int):
        return size
    return int(size) if size.is_Integer else str(size)
