"""Moves tokens into the order of each head on GPUs: one launch for each tensor.

The same gather in PyTorch makes a table of row numbers as large as the queries of a narrow head,
in a dozen launches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.launch import Launch, name_strides, next_power_of_2

WARPS = 4
# Values that a program moves: 32 of each thread. Their addresses take twice the registers.
_VALUES = 4096


@triton.jit
def gather_rows_kernel(
    p_x, p_rows, p_out,
    count, heads, group,
    stride_xb, stride_xh, stride_xn, stride_xd,
    stride_ob, stride_oh, stride_on,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`out[b, h, i] = x[b, h // group, rows[b, h, i]]` for one tile of rows (grid axis 0) of one
    head (axis 1). Rows may be of any length and stride."""
    row = tl.program_id(1)
    batch = row // heads
    head = row % heads
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    o_d = tl.arange(0, PADDED_DIM)
    is_row = o_n < count
    is_value = is_row[:, None] & (o_d < DIM)[None, :]
    source = tl.load(p_rows + row.to(tl.int64) * count + o_n, mask=is_row, other=0).to(tl.int64)
    p_x += batch.to(tl.int64) * stride_xb + (head // group).to(tl.int64) * stride_xh
    p_out += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    values = tl.load(
        p_x + source[:, None] * stride_xn + o_d[None, :] * stride_xd, mask=is_value, other=0.0
    )
    tl.store(p_out + o_n.to(tl.int64)[:, None] * stride_on + o_d[None, :], values, mask=is_value)


def gather_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """As `reference.gather_tokens`: x `[B, Hk, N, D]` by rows int64 `[B, H, N]`."""
    return _gather(x, rows, x.new_empty((*rows.shape, x.shape[-1])))


def scatter_tokens(x: Tensor, inverse: Tensor) -> Tensor:
    """As `reference.scatter_tokens`: x `[B, H, N, D]`, the result in `[B, N, H, D]` memory."""
    batch, heads, count, dim = x.shape
    return _gather(x, inverse, x.new_empty((batch, count, heads, dim)).transpose(1, 2))


def _gather(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    if out.numel():
        prepare_gather(x, rows, out).run()
    return out


def prepare_gather(x: Tensor, rows: Tensor, out: Tensor) -> Launch:
    """The launch that writes `out` `[B, H, N, D]`, of which the channels must be contiguous."""
    batch, heads, count = rows.shape
    dim = x.shape[-1]
    padded_dim = next_power_of_2(dim)
    tile = max(1, _VALUES // padded_dim)
    return Launch(
        gather_rows_kernel,
        grid=(ceil_div(count, tile), batch * heads),
        args={
            "p_x": x,
            "p_rows": rows.contiguous(),
            "p_out": out,
            "count": count,
            "heads": heads,
            "group": heads // x.shape[1],
            **name_strides("x", "bhnd", x),
            **name_strides("o", "bhn", out),
        },
        constexprs={"DIM": dim, "PADDED_DIM": padded_dim, "TILE": tile},
        options={"num_warps": WARPS},
    )
