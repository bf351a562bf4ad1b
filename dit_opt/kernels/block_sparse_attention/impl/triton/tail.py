"""The centroid tail on GPUs: which blocks a list drops, and one step of the softmax over centroids.

The kernel reads the centroids in order and must know of each whether the row keeps its block. To
search the list for it would carry a position from tile to tile, so that no load could be
prefetched. Instead the lists are packed into one bit per block, which is read like a bias.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.impl.triton.tiles import load_tile, weigh_biased
from dit_opt.kernels.launch import Launch

# Words that one program packs, and list entries that it takes at a time.
WORDS, CHUNK = 32, 64


@triton.jit
def pack_lists_kernel(
    p_counts, p_indices, p_words, capacity, words, WORDS: tl.constexpr, CHUNK: tl.constexpr
):
    """Words of one row of a plan (grid axis 0): bit j % 32 of word j // 32 is set if j is kept.

    Entries do not repeat, so that adding their bits is the same as joining them.
    """
    row = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    count = tl.load(p_counts + row)
    b_words = tl.zeros([WORDS], tl.int32)
    for first in tl.range(0, count, CHUNK):
        o_i = first + tl.arange(0, CHUNK)
        b_block = tl.load(p_indices + row * capacity + o_i, mask=o_i < count, other=-1)
        b_bit = tl.full([CHUNK], 1, tl.int32) << (b_block & 31)
        is_here = (b_block >> 5)[:, None] == o_w[None, :]
        b_words += tl.sum(tl.where(is_here, b_bit[:, None], 0), 0)
    tl.store(p_words + row * words + o_w, b_words, mask=o_w < words)


def pack_lists(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Kept blocks as bits: int32 [Bp, H, nq, ceil(blocks / 32)] of contiguous lists."""
    words = new_words(counts, blocks)
    prepare_words(counts, indices, words).run()
    return words


def new_words(counts: Tensor, blocks: int) -> Tensor:
    """Memory for the bits of `blocks` blocks for each row of `counts`."""
    return counts.new_empty((*counts.shape, ceil_div(blocks, 32)))


def prepare_words(counts: Tensor, indices: Tensor, words: Tensor) -> Launch:
    """The launch that writes contiguous lists as bits to `words` of `new_words`."""
    size = words.shape[-1]
    return Launch(
        pack_lists_kernel,
        grid=(counts.numel(), ceil_div(size, WORDS)),
        args={
            "p_counts": counts,
            "p_indices": indices,
            "p_words": words,
            "capacity": indices.shape[-1],
            "words": size,
        },
        constexprs={"WORDS": WORDS, "CHUNK": CHUNK},
    )


@triton.jit
def attend_centroids(
    b_q, b_max, b_sum, b_acc, p_centroids, p_values, p_log_lengths, p_words, batch, head, first,
    blocks, scale_log2,
    TILE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over TILE centroids, those of kept blocks without weight.

    p_log_lengths and p_words point to the row's own.
    """
    b_k = load_tile(
        p_centroids, batch, head, first, blocks, DIM, 1,
        TILE, DIM, PADDED_DIM, USE_DESCRIPTORS, True,
    )  # fmt: skip
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    o_j = first + tl.arange(0, TILE)
    b_bias = tl.load(p_log_lengths + o_j, mask=o_j < blocks, other=-float("inf"))
    b_word = tl.load(p_words + (o_j >> 5), mask=o_j < blocks, other=0)
    is_kept = ((b_word >> (o_j & 31)) & 1) != 0
    b_bias = tl.where(is_kept, -float("inf"), b_bias)
    b_p, b_new, b_ref = weigh_biased(b_s, b_bias, b_max, scale_log2)
    b_alpha = tl.math.exp2(b_max - b_ref)
    b_v = load_tile(
        p_values, batch, head, first, blocks, DIM, 1,
        TILE, DIM, PADDED_DIM, USE_DESCRIPTORS, True,
    )  # fmt: skip
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc
