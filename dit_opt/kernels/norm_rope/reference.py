"""The specification of `ditopt::norm_rope_v1`: plain PyTorch in float32, and its output.

It also runs on CPUs, where the pass does not use the op: Inductor fuses the model's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.norm_rope.contract import Arguments


def new_output(x: Tensor, rows: Tensor | None) -> Tensor:
    """Allocate the result for `x` [B, N, H, D]: `x.dtype`, [B, H, N, D].

    Without `rows` it lies in [B, N, H, D] memory, as in models, so that the tokens are written
    contiguously. With `rows` it is contiguous, because every head has an order of its own.
    """
    batch, tokens, heads, dim = x.shape
    if rows is None:
        return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
    return x.new_empty((batch, heads, tokens, dim))


def compute_plainly(call: Arguments) -> Tensor:
    """Same result as `op.norm_rope`, which checks the arguments; one rounding, at the end."""
    x, rows = call.x, call.rows
    y = x.float()
    if call.eps >= 0:
        dims = (-2, -1) if call.across_heads else (-1,)
        y = y * torch.rsqrt(y.square().mean(dims, keepdim=True) + call.eps)
    if call.weight is not None:
        # [H, D] across heads, else [1, D]
        y = y * call.weight.float().reshape(-1, x.shape[-1])
    if call.cos is not None and call.sin is not None:
        y = _rotate(y, call.cos, call.sin, call.halves, call.rope_start)
    y = y.transpose(1, 2)
    if rows is not None:
        y = y.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
    return new_output(x, rows).copy_(y)


def _rotate(y: Tensor, cos: Tensor, sin: Tensor, halves: bool, start: int) -> Tensor:
    """Rotate the pairs of the tokens [start, start + M) of `y` [B, N, H, D]."""
    stop = start + cos.shape[0]
    a, b = _split(y[:, start:stop], halves)
    cos_a, cos_b = _split_table(cos, y.shape[-1], halves)
    sin_a, sin_b = _split_table(sin, y.shape[-1], halves)
    rotated = _join(a * cos_a - b * sin_a, b * cos_b + a * sin_b, halves)
    return torch.cat([y[:, :start], rotated, y[:, stop:]], 1)


def _split_table(table: Tensor, dim: int, halves: bool) -> tuple[Tensor, Tensor]:
    """The factors of both members of the pairs, each float32 [M, 1, D / 2]."""
    table = table.float().unsqueeze(1)
    return _split(table, halves) if table.shape[-1] == dim else (table, table)


def _split(y: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Both members of the pairs of channels, each [..., D / 2]."""
    a, b = y.chunk(2, -1) if halves else y.unflatten(-1, (-1, 2)).unbind(-1)
    return a, b


def _join(a: Tensor, b: Tensor, halves: bool) -> Tensor:
    """The inverse of `_split`."""
    return torch.cat([a, b], -1) if halves else torch.stack([a, b], -1).flatten(-2)
