"""The specification of block-sparse attention: lists become a token mask, then plain softmax.

Slow and large on purpose; every other implementation is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.tail import Tail


def expand_lists(counts: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """Turn lists into a mask: bool [Bp, H, nq, key_blocks], true where a block is kept.

    Entries of `indices` past the count of their row are ignored, whatever they hold.
    """
    kept = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    # One column more than there are blocks takes the entries past the count.
    target = torch.where(kept, indices.long(), key_blocks)
    mask = torch.zeros((*counts.shape, key_blocks + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, target, True)[..., :key_blocks]


def expand_blocks(mask: Tensor, queries: int, keys: int, block_q: int, block_k: int) -> Tensor:
    """Turn a block mask [..., nq, nk] into a token mask [..., queries, keys]."""
    tokens = mask.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    return tokens[..., :queries, :keys]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    tail: Tail | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention in which a query block sees the key blocks of its list.

    Of every other block it sees nothing or, with a `tail`, one key: the centroid, n times.

    Args:
        q: [B, H, Nq, D]; k, v: [B, Hk, Nk, D] with H a multiple of Hk.
        counts: int32 [B or 1, H, nq]; indices: int32 [B or 1, H, nq, capacity].
        key_bias: additive float32 [B or 1, H or 1, Nk], or None.
        tail: what represents dropped blocks; None leaves them out.
        dtype: what to compute in; float64 makes a reference for float32.

    Returns:
        out [B, H, Nq, D] in the dtype of q, and the natural logarithm of the softmax
        denominator, its tail included, as float32 [B, H, Nq]. A row without any key gives out 0
        and lse -inf.
    """
    out, lse = new_outputs(q)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    scores = q.to(dtype) @ k.transpose(-1, -2) * scale
    if key_bias is not None:
        scores = scores + key_bias.to(dtype).unsqueeze(-2)
    kept = expand_lists(counts, indices, ceil_div(k.shape[2], block_k))
    mask = expand_blocks(kept, q.shape[2], k.shape[2], block_q, block_k)
    scores = scores.masked_fill(~mask, -torch.inf)
    if tail is not None:
        group = q.shape[1] // tail.centroids.shape[1]
        centroids, values = (x.to(dtype).repeat_interleave(group, 1) for x in tail[:2])
        columns = q.to(dtype) @ centroids.transpose(-1, -2) * scale
        columns = columns + tail.log_lengths.to(dtype).unsqueeze(-2)
        kept = kept.repeat_interleave(block_q, -2)[..., : q.shape[2], :]
        scores = torch.cat([scores, columns.masked_fill(kept, -torch.inf)], -1)
        v = torch.cat([v, values], -2)
    total = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0.0).unsqueeze(-1))
    out.copy_(weights @ v)
    lse.copy_(total)
    return out, lse
