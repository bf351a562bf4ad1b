"""Random attention problems: inputs and a plan of a given density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention import reference


@dataclass(frozen=True)
class Problem:
    """Self-attention of batch 1: q, k, v [1, H, N, D] and a plan over square blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    indices: Tensor
    block: int

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.q.shape[-1] ** -0.5

    def density(self) -> float:
        """Kept share of the score matrix, in real tokens."""
        blocks = self.indices.shape[-1]
        mask = reference.expand_lists(self.counts, self.indices, blocks).double()
        tokens = torch.full((blocks,), self.block, dtype=torch.double, device=mask.device)
        tokens[-1] -= blocks * self.block - self.q.shape[2]
        kept = torch.einsum("bhqk,q,k->bh", mask, tokens, tokens)
        return float(kept.mean()) / self.q.shape[2] ** 2


def make_problem(
    tokens: int, heads: int, dim: int, density: float, dtype: torch.dtype, block: int, device: str
) -> Problem:
    """Normal inputs and random ascending lists; rows keep 0.4 to 1.6 times the mean, each its own.

    Every row keeps its own block. Counts are scaled so that their mean meets `density`.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(3))
    blocks = -(-tokens // block)
    spread = 0.4 + 1.2 * torch.rand(1, heads, blocks, generator=generator)
    exact = (spread / spread.mean() * density * blocks).flatten()
    # Rounding errors are carried on, so that the mean survives small counts.
    counts = exact.cumsum(0).round().diff(prepend=torch.zeros(1)).clamp(1, blocks)
    counts = counts.view(spread.shape).int()
    priority = torch.rand(1, heads, blocks, blocks, generator=generator)
    priority += torch.eye(blocks)
    rank = priority.argsort(-1, descending=True).argsort(-1)
    dropped = (rank >= counts.unsqueeze(-1)).int()
    indices = dropped.argsort(dim=-1, stable=True).int()
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return Problem(q, k, v, counts.to(device), indices.to(device), block)
