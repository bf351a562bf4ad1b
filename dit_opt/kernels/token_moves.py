"""Move tokens into and out of the order that each head wants.

Rows of one head are short and contiguous in the layouts that models use, so one `index_select`
over all of them costs about a copy; elementwise gathers cost several.
"""

from __future__ import annotations

import torch

_lib = torch.library.Library("ditopt", "FRAGMENT")
_lib.define("gather_tokens_v1(Tensor x, Tensor rows) -> Tensor")
_lib.define("scatter_tokens_v1(Tensor x, Tensor inverse) -> Tensor")
_lib.define("gather_bias_v1(Tensor bias, Tensor rows) -> Tensor")


def number_rows(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` `[B, Hk, N, D]` as a matrix of rows, without a copy where it can be, and where the tokens
    `rows` `[B, H, M]` of each head stand in it.
    """
    batch, heads, tokens, dim = x.shape
    if x.transpose(1, 2).is_contiguous():
        table, per_token, per_head = x.transpose(1, 2).reshape(-1, dim), heads, 1
    else:
        table, per_token, per_head = x.reshape(-1, dim), 1, tokens
    b = torch.arange(batch, device=x.device).view(-1, 1, 1) * (tokens * heads)
    # query heads of one group share a key head
    h = torch.arange(rows.shape[1], device=x.device).view(1, -1, 1) // (rows.shape[1] // heads)
    return table, b + h * per_head + rows * per_token


def gather_tokens(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`out[b, h, i] = x[b, h // group, rows[b, h, i]]`.

    Args:
        x: `[B, Hk, N, D]`, any strides; `[B, N, Hk, D]` memory costs no copy.
        rows: int64 `[B, H, N]`, H a multiple of Hk.

    Returns:
        `[B, H, N, D]`, contiguous.
    """
    batch, heads, count = rows.shape
    table, index = number_rows(x, rows)
    return table.index_select(0, index.reshape(-1)).view(batch, heads, count, x.shape[-1])


def scatter_tokens(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`out[b, h, n] = x[b, h, inverse[b, h, n]]`, in `[B, N, H, D]` memory.

    Args:
        x: `[B, H, N, D]`. inverse: int64 `[B, H, N]`, the inverse permutations of the rows.
    """
    batch, heads, count, dim = x.shape
    table, index = number_rows(x, inverse)
    flat = index.transpose(1, 2).reshape(-1)
    return table.index_select(0, flat).view(batch, count, heads, dim).transpose(1, 2)


def gather_bias(bias: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A key bias `[B or 1, H or 1, N]` in each head's order, `[B, H, N]`."""
    return bias.expand(rows.shape[0], rows.shape[1], -1).gather(2, rows)


def _fake_gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*rows.shape, x.shape[-1]))


def _fake_scatter(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    batch, heads, count, dim = x.shape
    return x.new_empty((batch, count, heads, dim)).transpose(1, 2)


def _fake_bias(bias: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return bias.new_empty(rows.shape)


for _name, _real, _fake in (
    ("gather_tokens_v1", gather_tokens, _fake_gather),
    ("scatter_tokens_v1", scatter_tokens, _fake_scatter),
    ("gather_bias_v1", gather_bias, _fake_bias),
):
    _lib.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditopt::{_name}", _fake, lib=_lib)
