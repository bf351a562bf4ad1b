"""Dense attention of many short strips at once on a CPU, by the fastest library kernels.

Two matrix products around a softmax, or torch's flash attention where that is faster (long strips
in float32) or more exact (bfloat16 with large scores).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.impl.torch.strips import Bucket
from dit_opt.kernels.scores import LOG2_E
from dit_opt.kernels.scratch import SCRATCH

# Per thread, of the scores of all strips that are multiplied at once.
SCORE_BYTES = 1 << 21

# With fewer queries than this, torch's flash attention takes 32 at a time and uses a second core
# badly (1.4x instead of 2x); two matrix products take over.
FLASH_QUERIES = 192


@dataclass(frozen=True)
class BlockedCall:
    """One call, cut into blocks: [B * heads * blocks, block, ...], ragged blocks padded.

    Attributes:
        group: query heads of a key head.
        bounded: no score exceeds `scores.SCORE_BOUND`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    out: Tensor
    lse: Tensor
    query_blocks: int
    key_blocks: int
    group: int
    scale: float
    bounded: bool
    with_lse: bool


def multiplies(call: BlockedCall, tokens: int) -> bool:
    """Whether strips of so many queries are multiplied by two products.

    Only these can mask padded lists, but they would round large bfloat16 scores.
    """
    return call.bounded if call.q.dtype == torch.bfloat16 else tokens < FLASH_QUERIES


def attend_dense(
    call: BlockedCall,
    bucket: Bucket,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of each strip, [strips, tokens, D], without the padding of ragged blocks."""
    if q.shape[1] > bucket.query_tokens:
        q = q[:, : bucket.query_tokens]
    if k.shape[1] > bucket.key_tokens:
        k, v = k[:, : bucket.key_tokens], v[:, : bucket.key_tokens]
    bias = None if bias is None else bias[:, None, : bucket.key_tokens]
    if multiplies(call, bucket.query_tokens):
        out, lse = _multiply(call, q, k, v, bias, counts)
    else:
        out, lse = _flash(q, k, v, bias, call.scale)
    if bias is None:
        return out, lse
    # The library kernels leave NaN where no key is left.
    empty = bias.amax(-1) == -torch.inf
    return out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention with float32 scores: out [strips, tokens, D] and lse [strips, tokens]."""
    mask = None if bias is None else bias.unsqueeze(1).to(q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), attn_mask=mask, scale=scale
    )
    return out.squeeze(1), lse.squeeze(1)


def _multiply(
    call: BlockedCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Dense attention by two matrix products, with scores in the dtype of q.

    Keys behind the first `counts` blocks of a strip are padding. The results are scratch memory,
    valid until the next call.
    """
    out = SCRATCH.take("out", q.dtype, *q.shape)
    lse = SCRATCH.take("lse", torch.float32, *q.shape[:2])
    strips, keys = k.shape[:2]
    tile = SCORE_BYTES * torch.get_num_threads() // (strips * keys * q.element_size())
    tile = max(1, min(tile, q.shape[1]))
    for begin in range(0, q.shape[1], tile):
        part, made, sums = q, out, lse
        if tile < q.shape[1]:
            part, made, sums = (x[:, begin : begin + tile] for x in (q, out, lse))
        scores = SCRATCH.take("scores", q.dtype, strips, part.shape[1], keys)
        if call.bounded and bias is None:
            # No weight can overflow, so the largest score need not be found and taken off.
            torch.baddbmm(scores, part, k.mT, beta=0, alpha=call.scale * LOG2_E, out=scores)
            torch.exp2(scores, out=scores)
            _mask_padding(call, scores, counts, 0.0)
            # Rounded to the dtype of the scores: summing bfloat16 to float32 costs a copy.
            total = scores.sum(-1, keepdim=True)
            if call.with_lse:
                sums.copy_(total.squeeze(-1).float().log())
            torch.bmm(scores, v, out=made).div_(total)
            continue
        torch.baddbmm(scores, part, k.mT, beta=0, alpha=call.scale, out=scores)
        if bias is not None:
            scores += bias
        _mask_padding(call, scores, counts, -torch.inf)
        if call.with_lse:
            # The largest score and its weight give the denominator. Copied, because the softmax
            # overwrites the scores.
            largest = scores.amax(-1).to(torch.float32, copy=True)
            torch.softmax(scores, -1, out=scores)
            sums.copy_(largest - scores.amax(-1).float().log())
        else:
            torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, v, out=made)
    return out, lse


def _mask_padding(
    call: BlockedCall, scores: Tensor, counts: list[int] | None, value: float
) -> None:
    """Overwrite the scores behind the blocks that each strip keeps, of ascending `counts`."""
    first = 0
    for count, equal in itertools.groupby(counts or ()):
        end = first + len(list(equal))
        scores[first:end, :, count * call.k.shape[1] :] = value
        first = end
