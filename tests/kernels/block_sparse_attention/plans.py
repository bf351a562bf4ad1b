"""Random inputs for the tests of block-sparse attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention import reference
from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div
from dit_opt.kernels.block_sparse_attention.tail import summarize_blocks


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `bias` adds a key-padding mask with finite offsets among the -inf.

    `bias_heads` is 1 or `heads`; `tail` adds the summaries of the key blocks.
    """

    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    queries: int = 192
    keys: int = 192
    dim: int = 32
    block_q: int = 64
    block_k: int = 64
    density: float = 0.5
    plan_batch: int = 1
    bias: bool = False
    bias_heads: int = 1
    tail: bool = False
    strided: bool = False


def make_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of a block mask [B, H, nq, nk]; unused entries hold garbage."""
    counts = mask.sum(-1).int()
    indices = torch.argsort((~mask).int(), dim=-1, stable=True).int()
    unused = torch.arange(mask.shape[-1]) >= counts.unsqueeze(-1)
    return counts, indices.masked_fill(unused, 2**30)


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    """Arguments of `reference.attend`, in its order; a tail is the tenth."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, tokens: int) -> Tensor:
        shape = (case.batch, heads, tokens, case.dim)
        if case.strided:
            shape = (case.batch, tokens, heads, case.dim)
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.transpose(1, 2) if case.strided else x

    blocks = (ceil_div(case.queries, case.block_q), ceil_div(case.keys, case.block_k))
    mask = torch.rand(case.plan_batch, case.heads, *blocks, generator=generator) < case.density
    bias = None
    if case.bias:
        bias = torch.randn(case.batch, case.bias_heads, case.keys, generator=generator)
        bias[torch.rand(bias.shape, generator=generator) < 0.3] = -torch.inf
        # A whole block without keys, which some rows keep as their only one.
        bias[..., : case.block_k] = -torch.inf
    q = normal(case.heads, case.queries)
    k, v = normal(case.key_heads, case.keys), normal(case.key_heads, case.keys)
    scale = case.dim**-0.5
    arguments = (q, k, v, *make_plan(mask), bias, scale, case.block_q, case.block_k)
    return (*arguments, summarize_blocks(k, v, bias, case.block_k)) if case.tail else arguments


def flatten_tail(arguments: tuple) -> tuple:
    """The same arguments as the op takes them."""
    return (*arguments[:9], *arguments[9]) if len(arguments) > 9 else arguments


def make_call(arguments: tuple, device: str = "cpu", **changes: Any) -> Arguments:
    """The same arguments as an implementation takes them."""
    moved = (x.to(device) if isinstance(x, Tensor) else x for x in flatten_tail(arguments))
    return Arguments(*moved, **changes)


def assert_matches_reference(
    results: tuple[Tensor, Tensor], arguments: tuple, out_error: float, lse_error: float
) -> None:
    """Compare out and lse with the float64 specification; no NaN may appear anywhere."""
    out, lse = results
    inputs = [x.double() if i < 3 else x for i, x in enumerate(arguments)]
    expected, expected_lse = reference.attend(*inputs, dtype=torch.float64)
    torch.testing.assert_close(out.double(), expected, atol=out_error, rtol=out_error)
    torch.testing.assert_close(lse, expected_lse, atol=lse_error, rtol=1e-5)
