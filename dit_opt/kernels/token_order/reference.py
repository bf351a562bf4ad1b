"""Moving tokens by torch's operators: the specification, and what runs on CPUs.

Rows of one head are short and contiguous in the layouts that models use, so one `index_select`
over all of them costs about a copy; elementwise gathers cost several.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """`out[b, h, i] = x[b, h // group, rows[b, h, i]]`.

    Args:
        x: `[B, Hk, N, D]`, any strides; `[B, N, Hk, D]` memory costs no copy.
        rows: int64 `[B, H, N]`, H a multiple of Hk.

    Returns:
        `[B, H, N, D]`, contiguous.
    """
    batch, heads, count = rows.shape
    table, index = _find_rows(x, rows)
    return table.index_select(0, index.reshape(-1)).view(batch, heads, count, x.shape[-1])


def scatter_tokens(x: Tensor, inverse: Tensor) -> Tensor:
    """`out[b, h, n] = x[b, h, inverse[b, h, n]]`, in `[B, N, H, D]` memory.

    Args:
        x: `[B, H, N, D]`. inverse: int64 `[B, H, N]`, the inverse permutations of the rows.
    """
    batch, heads, count, dim = x.shape
    table, index = _find_rows(x, inverse)
    flat = index.transpose(1, 2).reshape(-1)
    return table.index_select(0, flat).view(batch, count, heads, dim).transpose(1, 2)


def gather_bias(bias: Tensor, rows: Tensor) -> Tensor:
    """A key bias `[B or 1, H or 1, N]` in each head's order, `[B, H, N]`."""
    return bias.expand(rows.shape[0], rows.shape[1], -1).gather(2, rows)


def _find_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`x` as a matrix of rows, by a view where its strides allow one, and the index of each row."""
    batch, heads, tokens, dim = x.shape
    if x.transpose(1, 2).is_contiguous():
        table, per_token, per_head = x.transpose(1, 2).reshape(-1, dim), heads, 1
    else:
        table, per_token, per_head = x.reshape(-1, dim), 1, tokens
    b = torch.arange(batch, device=x.device).view(-1, 1, 1) * (tokens * heads)
    # query heads of one group share a key head
    h = torch.arange(rows.shape[1], device=x.device).view(1, -1, 1) // (rows.shape[1] // heads)
    return table, b + h * per_head + rows * per_token
