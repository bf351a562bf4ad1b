"""Arguments of the attention prologue, with NaN around everything that it may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

LAYOUTS = ("linear", "fused", "heads first", "strided")


@dataclass(frozen=True)
class Scene:
    """`rotated` tokens from `start` on; factors by pair are every second column of a table."""

    batch: int = 2
    tokens: int = 70
    heads: int = 3
    dim: int = 24
    norm: Literal["head", "across"] | None = "head"
    weight: bool = True
    table: Literal["channel", "pair"] | None = "channel"
    halves: bool = False
    start: int = 0
    rotated: int = 70
    rows: Literal["shared", "per head"] | None = None
    layout: str = "linear"


SCENES = {
    "one head's norm": Scene(),
    "halves, text in front": Scene(halves=True, start=9, rotated=61),
    "pairs, text behind": Scene(table="pair", rotated=50, layout="fused"),
    "pairs of halves": Scene(table="pair", halves=True, dim=16),
    "across heads": Scene(norm="across", table="pair", rows="per head"),
    "across heads, no weight": Scene(norm="across", weight=False, table=None, layout="strided"),
    "norm only": Scene(table=None, layout="heads first"),
    "odd head dimension": Scene(table=None, halves=True, dim=5, rows="per head"),
    "rotation only": Scene(norm=None, dim=80, tokens=35, rotated=35, layout="strided"),
    "own orders": Scene(start=9, rotated=50, rows="per head"),
    "shared order": Scene(halves=True, start=9, rotated=50, rows="shared", layout="heads first"),
    "order only": Scene(norm=None, table=None, rows="per head", batch=1),
    "layout only": Scene(norm=None, table=None),
}


def make_inputs(scene: Scene, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple:
    """The arguments of the op, in its order."""
    generator = torch.Generator().manual_seed(0)
    x = _lay_out(_make_x(scene, generator).to(device, dtype), scene.layout)
    weight = cos = sin = rows = None
    if scene.norm is not None and scene.weight:
        size = scene.dim * (scene.heads if scene.norm == "across" else 1)
        weight = (1 + 0.3 * torch.randn(size, generator=generator)).to(device, dtype)
    if scene.table is not None:
        cos, sin = (_make_table(scene, generator, device) for _ in range(2))
    if scene.rows == "per head":
        shape = (scene.batch, scene.heads, scene.tokens)
        rows = torch.rand(shape, generator=generator).argsort(-1).to(device)
    elif scene.rows == "shared":
        order = torch.rand(scene.tokens, generator=generator).argsort()
        rows = order.to(device).expand(scene.batch, scene.heads, -1)
    eps = -1.0 if scene.norm is None else 1e-6
    across = scene.norm == "across"
    return x, weight, eps, across, cos, sin, scene.halves, scene.start, rows


def _make_x(scene: Scene, generator: torch.Generator) -> torch.Tensor:
    """Tokens of different lengths, [B, N, H, D]."""
    x = torch.randn(scene.batch, scene.tokens, scene.heads, scene.dim, generator=generator)
    return x * (2 * torch.rand(*x.shape[:3], 1, generator=generator)).exp2()


def _lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in one of LAYOUTS."""
    if layout == "linear":
        return x
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        around = torch.full_like(x, torch.nan).repeat_interleave(2, -1)
        values = around[..., ::2]
    else:
        # the middle of q, k and v by one linear layer
        around = torch.full_like(x, torch.nan).repeat(1, 1, 3, 1)
        values = around[:, :, x.shape[2] : 2 * x.shape[2]]
    return values.copy_(x)


def _make_table(scene: Scene, generator: torch.Generator, device: str) -> torch.Tensor:
    """Factors that all differ, [M, D] or [M, D / 2]: no sines and cosines, so nothing repeats."""
    around = torch.full((scene.rotated + 2, scene.dim), torch.nan, device=device)
    part = around[1:-1] if scene.table == "channel" else around[1:-1, 1::2]
    return part.copy_(torch.randn(part.shape, generator=generator))
