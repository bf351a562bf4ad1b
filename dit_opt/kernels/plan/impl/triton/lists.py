"""Lists of kept blocks on GPUs, in one launch: of a block mask, or of a packed plan."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.launch import Launch

# Blocks that a program looks at together.
CHUNK = 256


@triton.jit
def list_blocks_kernel(
    p_kept, p_counts, p_indices, blocks, width, PACKED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The count and the ascending list of one row (grid axis 0), zero after its entries.

    `p_kept`: rows of `width` int32 words with a bit for each block, or of as many bytes as blocks.
    """
    row = tl.program_id(0).to(tl.int64)
    p_list = p_indices + row * blocks
    p_kept += row * width
    count = 0
    for first in range(0, blocks, CHUNK):
        o_j = first + tl.arange(0, CHUNK)
        if PACKED:
            b_word = tl.load(p_kept + (o_j >> 5), mask=o_j < blocks, other=0)
            b_kept = (b_word >> (o_j & 31)) & 1
        else:
            b_kept = tl.load(p_kept + o_j, mask=o_j < blocks, other=0).to(tl.int32)
        b_entry = count + tl.cumsum(b_kept, 0) - b_kept
        tl.store(p_list + b_entry, o_j, mask=b_kept != 0)
        count += tl.sum(b_kept, 0)
    tl.store(p_counts + row, count)
    for first in range(0, blocks, CHUNK):
        o_j = first + tl.arange(0, CHUNK)
        tl.store(p_list + o_j, tl.zeros([CHUNK], tl.int32), mask=(o_j >= count) & (o_j < blocks))


def list_kept(mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `plan.list_kept`."""
    return _list(mask.contiguous().view(torch.uint8), mask.shape[-1])


def unpack_plan(words: Tensor, tokens: int, block_k: int) -> tuple[Tensor, Tensor]:
    """As `packing.unpack_plan`."""
    return _list(words.contiguous(), ceil_div(tokens, block_k))


def _list(kept: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    counts = kept.new_empty(kept.shape[:-1], dtype=torch.int32)
    indices = kept.new_empty((*kept.shape[:-1], blocks), dtype=torch.int32)
    if counts.numel():
        launch_lists(kept, counts, indices).run()
    return counts, indices


def launch_lists(kept: Tensor, counts: Tensor, indices: Tensor) -> Launch:
    """`list_blocks_kernel` for a mask as uint8 [..., nk], or for int32 words."""
    args = {
        "p_kept": kept,
        "p_counts": counts,
        "p_indices": indices,
        "blocks": indices.shape[-1],
        "width": kept.shape[-1],
    }
    constexprs = {"PACKED": kept.dtype == torch.int32, "CHUNK": CHUNK}
    return Launch(list_blocks_kernel, (counts.numel(),), args, constexprs)
