"""Random attention problems: inputs, a plan of a given density, and what rivals may be off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dit_opt.kernels.block_sparse_attention import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Allowed root-mean-square error, relative to that of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


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


def make_block_mask(
    counts: Tensor, indices: Tensor, blocks: tuple[int, int], tokens: int
) -> BlockMask:
    """A plan over `blocks` of queries and keys as flex_attention's mask of full blocks."""
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=blocks,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )
