"""Shapes and plans of the GPU benchmark: attention calls of the models that people run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.plan.plan import list_kept

PlanKind = Literal["random", "video", "one dense head"]

# heads of a call by its tokens, so that the longest dense ones take a tenth of a second
HEADS = {4096: 24, 16384: 24, 17776: 48, 32768: 24, 75600: 8, 115200: 4, 115456: 4}
PADDING = 56

# Of a video plan: blocks around the query's own, and how often the same place comes again.
_PERIODS = 16


@dataclass(frozen=True)
class Case:
    """One self-attention call of batch 1, and the plan it is given.

    Attributes:
        masked: whether the last `PADDING` keys are padding, as of a prompt.
    """

    dim: int
    tokens: int
    heads: int
    density: float
    block_q: int = 128
    block_k: int = 64
    plan: PlanKind = "random"
    masked: bool = False

    @property
    def name(self) -> str:
        """For tables and JSON."""
        return (
            f"D={self.dim} N={self.tokens} H={self.heads} density={self.density:g} "
            f"{self.block_q}x{self.block_k} {self.plan}{' masked' if self.masked else ''}"
        )

    @property
    def dense_flops(self) -> int:
        """Of the two matrix products over all keys."""
        return 4 * self.heads * self.tokens**2 * self.dim


def list_cases() -> Iterator[Case]:
    """All cases, those that bars are about first; neighbours share a dense baseline."""
    for dim, tokens, densities in (
        (128, 32768, (0.5, 0.25, 1.0, 0.1)),
        (64, 17776, (0.25, 0.5)),
        (128, 16384, (0.5, 0.25, 0.1)),
        (128, 115200, (0.5, 0.25)),
        (128, 75600, (0.5, 0.25)),
        (128, 4096, (0.5, 0.25)),
        (64, 32768, (0.5, 0.25)),
    ):
        for density in densities:
            yield Case(dim, tokens, HEADS[tokens], density)
    # a video model's prompt is padded, and its kernel another one
    yield Case(128, 115456, HEADS[115456], 0.25, masked=True)
    for dim, tokens in ((128, 32768), (64, 17776)):
        yield Case(dim, tokens, HEADS[tokens], 0.25, block_k=128)
        yield Case(dim, tokens, HEADS[tokens], 0.25, plan="video")
        yield Case(dim, tokens, HEADS[tokens], 0.25, plan="one dense head")


def make_key_mask(case: Case, device: torch.device) -> Tensor | None:
    """Which keys are there, bool `[N]`; None if all are."""
    if not case.masked:
        return None
    return torch.arange(case.tokens, device=device) < case.tokens - PADDING


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Normal q, k, v `[1, H, N, D]` in `[1, N, H, D]` memory, as models make them."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, case.tokens, case.heads, case.dim)
    return tuple(
        torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )


def make_plan(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counts int32 `[1, H, nq]` and ascending lists int32 `[1, H, nq, nk]`, made on the device.

    Rows keep 0.4 to 1.6 times the mean, each its own, and always their own blocks. "random" keeps
    any others, "video" those around the row's own place and, farther away, the same place of other
    frames; "one dense head" is random but for the first head, which keeps everything, so that the
    mean density is higher than the case's.
    """
    generator = torch.Generator(device).manual_seed(1)
    rows, columns = ceil_div(case.tokens, case.block_q), ceil_div(case.tokens, case.block_k)
    shape = (1, case.heads, rows)
    spread = 0.4 + 1.2 * torch.rand(shape, generator=generator, device=device)
    wanted = spread / spread.mean() * case.density * columns
    counts = wanted.round().clamp(1, columns)
    if case.density == 1:
        counts = torch.full_like(counts, columns)
    priority = torch.rand((*shape, columns), generator=generator, device=device)
    place = (torch.arange(rows, device=device) + 0.5) * case.block_q / case.block_k
    distance = (torch.arange(columns, device=device) + 0.5 - place[:, None]).abs()
    if case.plan == "video":
        frame = max(1.0, columns / _PERIODS)
        offset = (distance + frame / 2) % frame - frame / 2
        priority = priority * 0.5 - offset.abs() / frame - distance / columns
    priority = torch.where(distance < max(1, case.block_q / case.block_k / 2), torch.inf, priority)
    rank = priority.argsort(-1, descending=True).argsort(-1)
    kept = rank < counts.unsqueeze(-1)
    if case.plan == "one dense head":
        kept[:, 0] = True
    return list_kept(kept)


def measure_density(case: Case, counts: Tensor) -> float:
    """The share of blocks that a plan keeps; its last block counts as a whole one."""
    return float(counts.double().mean()) / ceil_div(case.tokens, case.block_k)
