"""The order in which query blocks start on GPUs, in one launch where a sort takes five."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program, and rows that they are compared with at once.
TILE, CHUNK = 32, 128


@triton.jit
def order_rows_kernel(p_counts, p_order, rows, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Put some rows (grid axis 0) of one head (axis 1) where they stand in the order: behind all
    that are longer, and those before them that are as long."""
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
    """Rows by the length of their lists, the longest first: int32 like counts [..., nq], which are
    contiguous int32. Rows of one length keep their order."""
    order = torch.empty_like(counts)
    rows = counts.shape[-1]
    if counts.numel():
        grid = (triton.cdiv(rows, TILE), counts.numel() // rows)
        order_rows_kernel[grid](counts, order, rows, TILE=TILE, CHUNK=CHUNK)
    return order
