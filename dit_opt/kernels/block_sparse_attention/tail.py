"""The centroid tail: every key block as one key, one value and a length.

A dropped block that is represented in the softmax by its means costs one column instead of a whole
block, and the denominator stays close to that of dense attention.

Source: the approximate branch of Sol-Attn (arXiv 2607.24027), with means in place of sums, so that
float16 cannot overflow, and with lengths that a key bias weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div


class Tail(NamedTuple):
    """What represents each key block where a plan drops it.

    Attributes:
        centroids: [B, S, nk, D] in the dtype of the keys, the mean key c of each block; S is Hk,
            or H if a key bias differs from query head to query head.
        values: like `centroids`, the mean value m.
        log_lengths: float32 [B or 1, H or 1, nk], log n. A dropped block adds
            n * exp(scale * q.c) to the denominator of a row and m times that to its numerator;
            -inf adds nothing.
    """

    centroids: Tensor
    values: Tensor
    log_lengths: Tensor


def summarize_blocks(k: Tensor, v: Tensor, key_bias: Tensor | None, block_k: int) -> Tail:
    """Mean key, mean value and length of each block of `block_k` keys; the last may be ragged.

    A bias makes each key count exp(bias) times: n is the sum of these weights, c and m are means
    under them. A block without weight has n = 0 and means of 0. Exact, as the stand-in for a
    block, where its keys are equal.

    Plain torch operations that a compiler fuses into one reduction; sums are in float32. A trace
    with symbolic sizes holds for every length of two blocks or more; a single block is a case of
    its own, as every size of 1 is to torch.

    Args:
        k, v: [B, Hk, Nk, D], any strides.
        key_bias: additive float32 [B or 1, H or 1, Nk], or None.
    """
    tokens = k.shape[2]
    blocks = ceil_div(tokens, block_k)
    if key_bias is None and isinstance(tokens, int) and tokens % block_k == 0:
        means = [x.unflatten(2, (blocks, block_k)).mean(3, dtype=torch.float32) for x in (k, v)]
        lengths = k.new_full((1, 1, blocks), math.log(block_k), dtype=torch.float32)
        return Tail(means[0].to(k.dtype), means[1].to(v.dtype), lengths)
    if key_bias is None:
        key_bias = k.new_zeros((1, 1, tokens), dtype=torch.float32)
    elif key_bias.shape[1] > 1:
        k, v = (x.repeat_interleave(key_bias.shape[1] // x.shape[1], 1) for x in (k, v))
    # The ragged block reads the last token again, without weight: how much padding it needs would
    # be a guard.
    starts = torch.arange(blocks, device=k.device).unsqueeze(1) * block_k
    position = starts + torch.arange(block_k, device=k.device)
    source = position.clamp(max=tokens - 1)
    bias = key_bias[:, :, source].masked_fill(position >= tokens, -torch.inf)
    log_lengths = bias.logsumexp(-1)
    finite = log_lengths.masked_fill(log_lengths == -torch.inf, 0.0)
    weights = (bias - finite.unsqueeze(-1)).exp().unsqueeze(-1)
    centroids, values = ((x[:, :, source].float() * weights).sum(3) for x in (k, v))
    return Tail(centroids.to(k.dtype), values.to(v.dtype), log_lengths)


_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "summarize_blocks_v1(Tensor k, Tensor v, Tensor? key_bias, int block_k) "
    "-> (Tensor centroids, Tensor values, Tensor log_lengths)"
)


@torch.library.impl(_library, "summarize_blocks_v1", "CompositeImplicitAutograd")
def _summarize(
    k: Tensor, v: Tensor, key_bias: Tensor | None, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    # Composite and implicit: a compiler sees the operations inside and fuses them.
    tail = summarize_blocks(k, v, key_bias, block_k)
    return tail.centroids, tail.values, tail.log_lengths
