"""What the op accepts: the arguments of `ditopt::norm_rope`, and their checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import DTYPES


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, as the schema names them."""

    x: Tensor
    weight: Tensor | None
    eps: float
    across_heads: bool
    cos: Tensor | None
    sin: Tensor | None
    halves: bool
    rope_start: int
    rows: Tensor | None


def check_arguments(call: Arguments) -> None:
    """Raise on the first argument that does not fit; reads shapes, dtypes and devices only."""
    x, cos, sin, rows = call.x, call.cos, call.sin, call.rows
    if x.dim() != 4:
        raise ValueError(
            f"norm_rope: x must be [B, N, H, D], not {tuple(x.shape)}; unflatten its heads first."
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"norm_rope: x has dtype {x.dtype}, but only float32, float16 and bfloat16 are "
            "supported; cast it, or leave the model's own operations."
        )
    if call.weight is not None:
        _check_weight(x, call.weight, call.eps, call.across_heads)
    if cos is not None and sin is not None:
        _check_tables(x, cos, sin, call.rope_start)
    elif cos is not None or sin is not None:
        raise ValueError(
            f"norm_rope: {'cos' if sin is None else 'sin'} was given, but "
            f"{'sin' if sin is None else 'cos'} is None; pass both tables, or none for no rotation."
        )
    batch, tokens, heads, _ = x.shape
    if rows is not None and (rows.shape != (batch, heads, tokens) or rows.dtype != torch.int64):
        raise ValueError(
            f"norm_rope: rows must be int64 [B, H, N], here {[batch, heads, tokens]}, not "
            f"{rows.dtype} {tuple(rows.shape)}; expand an order that heads share."
        )
    tensors = [tensor for tensor in (x, call.weight, cos, sin, rows) if tensor is not None]
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(
            "norm_rope: all tensors must be on one device, not "
            f"{', '.join(sorted({str(tensor.device) for tensor in tensors}))}; move them to that "
            "of x."
        )


def _check_weight(x: Tensor, weight: Tensor, eps: float, across_heads: bool) -> None:
    if eps < 0:
        raise ValueError(
            f"norm_rope: a weight was given, but eps={eps} asks for no normalisation; pass no "
            "weight, or an eps of 0 or more."
        )
    heads, dim = x.shape[2:]
    expected = heads * dim if across_heads else dim
    if weight.shape != (expected,):
        raise ValueError(
            f"norm_rope: weight must be [{expected}] for x {tuple(x.shape)} with "
            f"across_heads={across_heads}, not {tuple(weight.shape)}; is the norm over each head, "
            "or across all of them?"
        )


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor, rope_start: int) -> None:
    tokens, dim = x.shape[1], x.shape[3]
    if dim % 2:
        raise ValueError(
            f"norm_rope: the {dim} channels of a head make no pairs, so there is nothing to "
            "rotate; pass neither cos nor sin."
        )
    if not (cos.is_floating_point() and sin.is_floating_point()):
        raise ValueError(
            f"norm_rope: cos and sin must be real, not {cos.dtype} and {sin.dtype}; pass the real "
            "and the imaginary part of complex factors."
        )
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] not in (dim, dim // 2):
        raise ValueError(
            f"norm_rope: cos and sin must both be [M, {dim}], a factor for each channel, or "
            f"[M, {dim // 2}], one for each pair, not {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if rope_start < 0 or rope_start + cos.shape[0] > tokens:
        raise ValueError(
            f"norm_rope: the {cos.shape[0]} tokens from {rope_start} on are not all among the "
            f"{tokens} of x; cut the tables, or move rope_start."
        )
