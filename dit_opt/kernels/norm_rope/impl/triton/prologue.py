"""The attention prologue on GPUs: what a call of `ditopt::norm_rope_v1` launches."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.launch import Launch, name_strides, next_power_of_2
from dit_opt.kernels.norm_rope.contract import Arguments
from dit_opt.kernels.norm_rope.impl.triton.kernels import measure_rows_kernel, norm_rope_kernel
from dit_opt.kernels.norm_rope.reference import new_output

WARPS = 4
# Values that a program holds at a time: 16 of each thread, and twice as many factors.
_VALUES = 2048
# Heads of a program, as long as that leaves enough programs to fill a GPU.
_MAX_GROUP, _LEAST_PROGRAMS = 8, 1024


def choose_tile(padded_dim: int) -> int:
    """Tokens of a program."""
    return max(1, _VALUES // padded_dim)


def choose_group(heads: int, tiles: int, per_head: bool) -> int:
    """Heads of a program; one where no two of them share the factors of a token."""
    if per_head:
        return 1
    groups = max(ceil_div(heads, _MAX_GROUP), ceil_div(_LEAST_PROGRAMS, tiles))
    return ceil_div(heads, min(heads, groups))


def compute(call: Arguments) -> Tensor:
    """Same result as `reference.compute_plainly`.

    Runs on the device of `x`, or on CPU tensors under TRITON_INTERPRET=1.
    """
    out = new_output(call.x, call.rows)
    if out.numel() == 0:
        return out
    rstd = None
    if call.across_heads and call.eps >= 0:
        rstd = call.x.new_empty(call.x.shape[:2], dtype=torch.float32)
        prepare_measure(call.x, call.eps, rstd).run()
    prepare(call, rstd, out).run()
    return out


def prepare(call: Arguments, rstd: Tensor | None, out: Tensor) -> Launch:
    """The launch that writes `out`; with `rstd` of `prepare_measure` the norm is across heads."""
    x, cos, sin, rows = call.x, call.cos, call.sin, call.rows
    batch, tokens, heads, dim = x.shape
    padded_half = next_power_of_2(ceil_div(dim, 2))
    tile = choose_tile(2 * padded_half)
    tiles = ceil_div(tokens, tile)
    # An order that heads share is expanded, and its factors are loaded once.
    per_head = rows is not None and rows.stride(1) != 0
    group = choose_group(heads, tiles * batch, per_head)
    rotated = 0 if cos is None else cos.shape[0]
    return Launch(
        norm_rope_kernel,
        grid=(tiles * ceil_div(heads, group), batch),
        args={
            "p_x": x,
            # Pointers must be given; those that stand for nothing are never read.
            "p_weight": x if call.weight is None else call.weight.contiguous(),
            "p_cos": x if cos is None else cos,
            "p_sin": x if sin is None else sin,
            "p_rows": x if rows is None else rows,
            "p_rstd": x if rstd is None else rstd,
            "p_out": out,
            "eps": call.eps,
            "tokens": tokens,
            "heads": heads,
            "group": group,
            "rope_start": call.rope_start,
            "rope_stop": call.rope_start + rotated,
            **name_strides("x", "bnhd", x),
            "stride_cn": 0 if cos is None else cos.stride(0),
            "stride_sn": 0 if sin is None else sin.stride(0),
            **name_strides("r", "bhn", rows),
            **name_strides("o", "bhn", out),
        },
        constexprs={
            "HAS_NORM": call.eps >= 0,
            "HAS_WEIGHT": call.weight is not None,
            "ACROSS": rstd is not None,
            "ROPE": cos is not None,
            "HALVES": call.halves and cos is not None,
            "PER_PAIR": cos is not None and cos.shape[1] != dim,
            "HAS_ROWS": rows is not None,
            "PER_HEAD": per_head,
            "STRIDE_CD": 1 if cos is None else cos.stride(1),
            "STRIDE_SD": 1 if sin is None else sin.stride(1),
            "DIM": dim,
            "PADDED_HALF": padded_half,
            "TILE": tile,
        },
        options={"num_warps": WARPS},
    )


def prepare_measure(x: Tensor, eps: float, rstd: Tensor) -> Launch:
    """The launch that writes rsqrt(mean(x^2) + eps) over all heads to `rstd`, float32 [B, N]."""
    batch, tokens, heads, dim = x.shape
    padded_dim = next_power_of_2(dim)
    tile = choose_tile(padded_dim)
    return Launch(
        measure_rows_kernel,
        grid=(ceil_div(tokens, tile), batch),
        args={
            "p_x": x,
            "p_rstd": rstd,
            "eps": eps,
            "tokens": tokens,
            "heads": heads,
            **name_strides("x", "bnhd", x),
        },
        constexprs={"DIM": dim, "PADDED_DIM": padded_dim, "TILE": tile},
        options={"num_warps": WARPS},
    )
