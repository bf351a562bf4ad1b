"""Registers `ditopt::norm_rope_v1` for processors and GPUs, and its fake.

One op from the linear layer's output to what attention reads: normalisation, rotation, layout and
each head's order of tokens cost one pass over the queries instead of one each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import DTYPES
from dit_opt.kernels.norm_rope.reference import compute_plainly, new_output

# The version is part of the name because the fake's body is in no compile cache key.
NAME = "norm_rope_v1"
SCHEMA = (
    "(Tensor x, Tensor? weight, float eps, bool across_heads, Tensor? cos, Tensor? sin, "
    "bool halves, SymInt rope_start, Tensor? rows) -> Tensor"
)

torch.library.define(f"ditopt::{NAME}", SCHEMA, tags=(torch.Tag.flexible_layout,))


def norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = -1.0,
    across_heads: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    halves: bool = False,
    rope_start: int = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """Normalise and rotate queries or keys, and lay them out as attention reads them.

    y = x * rsqrt(mean(x^2) + eps) * weight, then for every pair (a, b) of channels of the tokens
    rope_start <= n < rope_start + M: (a * cos_a - b * sin_a, b * cos_b + a * sin_b). All of it in
    float32, rounded once to the dtype of `x`.

    Args:
        x: [B, N, H, D] in float32, float16 or bfloat16, any strides.
        weight: [D], or [H * D] with `across_heads`, in any float dtype; None for none.
        eps: 0 or more; below 0 nothing is normalised, and there must be no weight.
        across_heads: whether the mean is over H * D, or over D.
        cos, sin: both [M, D], a factor for each channel, or both [M, D / 2], one for each pair
            (cos_a = cos_b), in any float dtype and strides; None for no rotation.
        halves: whether the pairs are the channels (i, i + D / 2), or (2 i, 2 i + 1).
        rope_start: the first token that is rotated.
        rows: int64 [B, H, N], any strides: out[b, h, i] = y[b, h, rows[b, h, i]]. Every number must
            be in [0, N); nobody looks. None for the order as it is.

    Returns:
        [B, H, N, D] in the dtype of `x`: contiguous with `rows`, else a transposed view of
        [B, N, H, D] memory.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit together, only one of `cos` and `sin`,
            a rotation of an odd D or beyond the last token, a weight without normalisation.
    """
    return torch.ops.ditopt.norm_rope_v1(
        x, weight, eps, across_heads, cos, sin, halves, rope_start, rows
    )


@torch.library.impl(f"ditopt::{NAME}", "CPU")
def _run_on_cpu(*arguments: Any) -> Tensor:
    # The specification will do: on processors Inductor fuses the model's own operations.
    _check(*arguments)
    return compute_plainly(*arguments)


@torch.library.impl(f"ditopt::{NAME}", "CUDA")
def _run_on_gpu(*arguments: Any) -> Tensor:
    # Imported here because Triton is absent where there is no GPU to run it on.
    from dit_opt.kernels.norm_rope import triton

    _check(*arguments)
    return triton.launch(*arguments)


@torch.library.register_fake(f"ditopt::{NAME}")
def _describe(x: Tensor, *arguments: Any) -> Tensor:
    return new_output(x, arguments[-1])


def _check(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    across_heads: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    halves: bool,
    rope_start: int,
    rows: Tensor | None,
) -> None:
    """Raise on the first argument that does not fit; reads shapes, dtypes and devices only."""
    if x.dim() != 4:
        raise ValueError(
            f"norm_rope: x must be [B, N, H, D], not {tuple(x.shape)}; unflatten its heads first."
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"norm_rope: x has dtype {x.dtype}, but only float32, float16 and bfloat16 are "
            "supported; cast it, or leave the model's own operations."
        )
    if weight is not None:
        _check_weight(x, weight, eps, across_heads)
    if cos is not None and sin is not None:
        _check_tables(x, cos, sin, rope_start)
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
    tensors = [tensor for tensor in (x, weight, cos, sin, rows) if tensor is not None]
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
