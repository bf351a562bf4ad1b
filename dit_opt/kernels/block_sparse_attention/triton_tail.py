"""The centroid tail on GPUs: which blocks a list drops, and one step of the softmax over centroids.

The kernel meets the centroids in order and must know of each whether the row keeps its block. A
list says so only to who searches it, and where the search stands would be carried from tile to
tile, so that no load could start early. One bit per block is made from the lists instead: a 32nd
of a list that keeps everything, read like a bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.triton_tiles import load_tile, weigh_biased

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
    words = ceil_div(blocks, 32)
    packed = torch.empty((*counts.shape, words), dtype=torch.int32, device=counts.device)
    grid = (counts.numel(), ceil_div(words, WORDS))
    pack_lists_kernel[grid](
        counts, indices, packed, indices.shape[-1], words, WORDS=WORDS, CHUNK=CHUNK
    )
    return packed


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
