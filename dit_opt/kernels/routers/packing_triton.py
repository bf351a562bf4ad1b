"""Lists out of packed plans on GPUs, in one launch: every step between two searches needs them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div

# Blocks that a program looks at together.
CHUNK = 256


@triton.jit
def unpack_words_kernel(p_words, p_counts, p_indices, blocks, words, CHUNK: tl.constexpr):
    """The count and the ascending list of one row (grid axis 0), zero after its entries."""
    row = tl.program_id(0).to(tl.int64)
    p_list = p_indices + row * blocks
    count = 0
    for first in tl.range(0, blocks, CHUNK):
        o_j = first + tl.arange(0, CHUNK)
        b_word = tl.load(p_words + row * words + (o_j >> 5), mask=o_j < blocks, other=0)
        b_bit = (b_word >> (o_j & 31)) & 1
        b_place = count + tl.cumsum(b_bit, 0) - b_bit
        tl.store(p_list + b_place, o_j, mask=b_bit != 0)
        count += tl.sum(b_bit, 0)
    tl.store(p_counts + row, count)
    for first in tl.range(0, blocks, CHUNK):
        o_j = first + tl.arange(0, CHUNK)
        tl.store(p_list + o_j, tl.zeros([CHUNK], tl.int32), mask=(o_j >= count) & (o_j < blocks))


def unpack_plan(words: Tensor, tokens: int, block_k: int) -> tuple[Tensor, Tensor]:
    """As `packing.unpack_plan`."""
    words, blocks = words.contiguous(), ceil_div(tokens, block_k)
    counts = words.new_empty(words.shape[:-1])
    indices = words.new_empty((*words.shape[:-1], blocks))
    if counts.numel():
        unpack_words_kernel[(counts.numel(),)](
            words, counts, indices, blocks, words.shape[-1], CHUNK=CHUNK
        )
    return counts, indices
