"""The order in which query blocks start on GPUs, in one launch where a sort takes five."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.launch import Launch

# Rows of a program, and rows that they are compared with at once.
TILE, CHUNK = 32, 128


@triton.jit
def order_rows_kernel(p_counts, p_order, rows, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Write some rows (grid axis 0) of one head (axis 1) to their places in the order: behind all
    longer rows, and behind equally long ones with a smaller index."""
    line = tl.program_id(1).to(tl.int64) * rows
    p_counts += line
    o_row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    b_count = tl.load(p_counts + o_row, mask=o_row < rows, other=0)
    b_rank = tl.zeros([TILE], tl.int32)
    for first in tl.range(0, rows, CHUNK):
        o_other = first + tl.arange(0, CHUNK)
        b_other = tl.load(p_counts + o_other, mask=o_other < rows, other=-1)
        is_tie = (b_other[None, :] == b_count[:, None]) & (o_other[None, :] < o_row[:, None])
        is_before = (b_other[None, :] > b_count[:, None]) | is_tie
        b_rank += tl.sum(is_before.to(tl.int32), 1)
    tl.store(p_order + line + b_rank, o_row, mask=o_row < rows)


def order_rows(counts: Tensor) -> Tensor:
    """The rows of contiguous int32 lists by their length, the longest first; int32 like counts."""
    order = torch.empty_like(counts)
    if counts.numel():
        prepare_order(counts, order).run()
    return order


def prepare_order(counts: Tensor, order: Tensor) -> Launch:
    """The launch that writes to `order` the rows by the length of their lists, the longest first.

    Both are contiguous int32 [..., nq], not empty. Rows of one length keep their order.
    """
    rows = counts.shape[-1]
    return Launch(
        order_rows_kernel,
        grid=(ceil_div(rows, TILE), counts.numel() // rows),
        args={"p_counts": counts, "p_order": order, "rows": rows},
        constexprs={"TILE": TILE, "CHUNK": CHUNK},
    )
