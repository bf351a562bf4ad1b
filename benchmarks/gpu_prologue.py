"""The prologue part of the GPU benchmark: one kernel beside what Inductor makes of the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import time_captured
from benchmarks.problems import TOLERANCE
from dit_opt.kernels.norm_rope import norm_rope
from dit_opt.kernels.norm_rope.contract import Arguments
from dit_opt.kernels.norm_rope.reference import compute_plainly

OURS, COMPILED = "ditopt", "compiled"
DTYPE = torch.bfloat16
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Queries or keys `[1, tokens, heads, dim]` of a model.

    `across_heads` is how Wan normalises, with a factor for each pair of channels; without it each
    head is normalised, with a factor for each channel, as in Flux.
    """

    model: str
    tokens: int
    heads: int
    across_heads: bool
    dim: int = 128

    @property
    def name(self) -> str:
        """For tables and JSON."""
        return f"{self.model} N={self.tokens} H={self.heads} D={self.dim}"


SHAPES = (
    Shape("Wan 1.3B", 32760, 12, True),
    Shape("Wan 14B", 32760, 40, True),
    Shape("Wan 14B", 75600, 40, True),
    Shape("Flux", 4608, 24, False),
)


def make_inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A linear layer's output, the weight of the norm, cosines and sines float32 `[N, D]`.

    Both members of a pair of channels have the same factor, as rotations do.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    x = normal(1, shape.tokens, shape.heads, shape.dim).to(DTYPE)
    weight = 1 + 0.1 * normal(shape.dim * (shape.heads if shape.across_heads else 1))
    angles = normal(shape.tokens, shape.dim // 2).repeat_interleave(2, -1)
    return x, weight.to(DTYPE), angles.cos(), angles.sin()


def compute_as_wan(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's processor in diffusers: a norm over all heads, pairs written one by one."""
    flat = x.flatten(2)
    x = torch.nn.functional.rms_norm(flat, flat.shape[-1:], weight, EPS).view_as(x)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, 0::2], sin[:, None, 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.transpose(1, 2)


def compute_as_flux(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Flux's processor in diffusers: a norm of each head, pairs turned and stacked."""
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], -1).flatten(3)
    out = x.float() * cos[:, None] + turned.float() * sin[:, None]
    return out.to(x.dtype).transpose(1, 2)


def measure_prologue(shape: Shape, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of our kernel and of the model's own operations, compiled; no speed if wrong.

    The rate counts the queries once read and once written.
    """
    x, weight, cos, sin = make_inputs(shape, device)
    # Wan's factors are every second column, as `passes.qk_prologue` finds them.
    tables = (cos[:, 0::2], sin[:, 1::2]) if shape.across_heads else (cos, sin)
    arguments = (x, weight, EPS, shape.across_heads, *tables)
    expected = compute_plainly(Arguments(x.float(), *arguments[1:], False, 0, None))
    # Freed at once: what the kernel allocates next holds NaN where it does not write.
    torch.full_like(x, torch.nan)
    errors = {OURS: _measure_error(norm_rope(*arguments), expected)}
    row: dict[str, Any] = {"relative_errors": errors}
    if not errors[OURS] <= TOLERANCE[DTYPE]:
        return row | {"refused": f"wrong: relative error {errors[OURS]:.3g}"}
    torch.compiler.reset()
    plain = compute_as_wan if shape.across_heads else compute_as_flux
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)
    errors[COMPILED] = _measure_error(compiled(x, weight, cos, sin), expected)
    if not errors[COMPILED] <= TOLERANCE[DTYPE]:
        return row | {"refused": f"compiled is wrong: relative error {errors[COMPILED]:.3g}"}
    rivals = {
        OURS: lambda: norm_rope(*arguments),
        COMPILED: lambda: compiled(x, weight, cos, sin),
    }
    times = time_captured(rivals, seconds, device)
    return row | {
        "settings": dataclasses.asdict(shape),
        "times": {name: dataclasses.asdict(t) for name, t in times.items()},
        "milliseconds": {name: t.median for name, t in times.items()},
        "speedup": times[COMPILED].median / times[OURS].median,
        "tb_per_s": {name: 2 * x.nbytes / t.median / 1e9 for name, t in times.items()},
    }


def _measure_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())
