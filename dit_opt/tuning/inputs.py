"""What tilings of the attention kernel are measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_opt.kernels.block_sparse_attention.contract import Arguments
from dit_opt.kernels.plan.plan import list_kept

BLOCK_Q = 128


@dataclass(frozen=True)
class Workload:
    """What the candidates attend to: random lists that keep a share `density` of all blocks.

    The last block is ragged, as those of most videos are, which is another branch of the kernel.
    There are as many key heads as heads unless it says how many.
    """

    tokens: int = 32760
    heads: int = 24
    density: float = 0.25
    dtype: torch.dtype = torch.bfloat16
    key_heads: int | None = None


def make_inputs(workload: Workload, dim: int, block_k: int, device: torch.device) -> Arguments:
    """Normal tensors in `[1, N, H, D]` memory, and a plan whose rows differ in length."""
    generator = torch.Generator(device).manual_seed(0)
    key_heads = workload.heads if workload.key_heads is None else workload.key_heads
    like = {"generator": generator, "device": device, "dtype": workload.dtype}
    q, k, v = (
        torch.randn((1, workload.tokens, heads, dim), **like)
        for heads in (workload.heads, key_heads, key_heads)
    )
    rows, columns = -(-workload.tokens // BLOCK_Q), -(-workload.tokens // block_k)
    draw = torch.rand((1, workload.heads, rows, columns), generator=generator, device=device)
    # no row can keep more than everything
    spread = min(0.6, 1 / workload.density - 1)
    even = torch.rand(draw.shape[:-1], generator=generator, device=device)
    share = workload.density * (1 + spread * (2 * even - 1))
    kept = draw < share.unsqueeze(-1)
    kept[..., 0] = True
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    counts, indices = list_kept(kept)
    return Arguments(q, k, v, counts, indices, None, dim**-0.5, BLOCK_Q, block_k)
