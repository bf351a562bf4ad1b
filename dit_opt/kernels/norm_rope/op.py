"""Registers `ditopt::norm_rope_v1` for CPUs and GPUs, and its fake.

One op from the linear layer's output to what attention reads: normalisation, rotation, layout and
each head's order of tokens cost one pass over the queries instead of one each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.norm_rope.contract import Arguments, check_arguments
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
            be in [0, N), which is not checked. None keeps the order.

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
    # The reference suffices: on CPUs the pass leaves the model's own operations to Inductor.
    call = Arguments(*arguments)
    check_arguments(call)
    return compute_plainly(call)


@torch.library.impl(f"ditopt::{NAME}", "CUDA")
def _run_on_gpu(*arguments: Any) -> Tensor:
    # Imported here because Triton is absent where there is no GPU to run it on.
    from dit_opt.kernels.norm_rope.impl.triton import prologue

    call = Arguments(*arguments)
    check_arguments(call)
    return prologue.compute(call)


@torch.library.register_fake(f"ditopt::{NAME}")
def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return new_output(x, arguments[-1])
