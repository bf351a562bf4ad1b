"""Scores between pooled tokens, for searches whose exact scores would cost too much."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_opt.kernels.block_sparse_attention.contract import ceil_div

# Scores held at once. On a CPU they should stay in the cache from the product to the sums.
_CPU_SCORE_BYTES = 1 << 22
_DEVICE_SCORE_BYTES = 1 << 28


def pool_tokens(x: Tensor, size: int) -> Tensor:
    """Means over `size` consecutive tokens, float32 [B, H, ceil(N / size), D].

    The last mean is over the remaining real tokens; nothing is copied or padded.
    """
    full = x.shape[2] // size * size
    means = x[:, :, :full].unflatten(2, (-1, size)).sum(3, dtype=torch.float32) / size
    if full == x.shape[2]:
        return means
    last = x[:, :, full:].sum(2, keepdim=True, dtype=torch.float32) / (x.shape[2] - full)
    return torch.cat([means, last], 2)


def weigh_cells(tokens: int, size: int, cells: int, bias: Tensor | None, like: Tensor) -> Tensor:
    """The logarithm of the number of keys in each pooled cell, float32 [B or 1, H or 1, cells].

    An additive bias [B or 1, H or 1, tokens] gives keys a weight of exp(bias); cells beyond the
    last real token, and cells that a mask removes, have -inf.
    """
    if bias is None:
        bias = like.new_zeros((1, 1, tokens), dtype=torch.float32)
    padded = pad(bias.float(), (0, cells * size - tokens), value=-torch.inf)
    return padded.unflatten(-1, (cells, size)).logsumexp(-1)


def score_blocks(
    q: Tensor,
    k: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    cell_q: int,
    cell_k: int,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The log-sum-exp over the pairs of pooled cells of each pair of blocks, [B, H, nq, nk].

    q [B, H, Nq, D] and k [B, Hk, Nk, D] are pooled to means of cell_q and cell_k tokens, which
    divide the blocks. Scores are float32 for every dtype: bfloat16 scores would have ties, which
    favour low indices. A cell counts as often as it has real tokens; blocks without any key score
    -inf.
    """
    if block_q % cell_q or block_k % cell_k:
        raise ValueError(
            f"Cells of {cell_q} x {cell_k} tokens do not divide blocks of {block_q} x {block_k}; "
            "take powers of two up to the block."
        )
    batch, heads, queries, dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    query_blocks, key_blocks = ceil_div(queries, block_q), ceil_div(keys, block_k)
    rows, columns = block_q // cell_q, block_k // cell_k
    pooled_q = pad(
        pool_tokens(q, cell_q) * scale, (0, 0, 0, query_blocks * rows - ceil_div(queries, cell_q))
    )
    pooled_k = pool_tokens(k, cell_k).repeat_interleave(group, 1)
    pooled_k = pad(pooled_k, (0, 0, 0, key_blocks * columns - ceil_div(keys, cell_k)))
    weights_q = weigh_cells(queries, cell_q, query_blocks * rows, None, pooled_q)
    weights_k = weigh_cells(keys, cell_k, key_blocks * columns, key_bias, pooled_k)
    weights_k = weights_k.expand(batch, heads, -1).reshape(batch * heads, 1, -1)
    pooled_q = pooled_q.view(batch * heads, -1, dim)
    pooled_k = pooled_k.view(batch * heads, -1, dim)

    limit = _CPU_SCORE_BYTES if q.device.type == "cpu" else _DEVICE_SCORE_BYTES
    per_block = 4 * rows * key_blocks * columns
    at_once = min(query_blocks, max(1, limit // per_block))
    heads_at_once = max(1, limit // (per_block * at_once))
    out = q.new_empty((batch * heads, query_blocks, key_blocks), dtype=torch.float32)
    for head in range(0, batch * heads, heads_at_once):
        part = slice(head, head + heads_at_once)
        for first in range(0, query_blocks, at_once):
            cells = slice(first * rows, (first + at_once) * rows)
            scores = torch.bmm(pooled_q[part, cells], pooled_k[part].mT)
            scores += weights_k[part] + weights_q[0, 0, cells, None]
            scores = scores.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
            out[part, first : first + at_once] = scores.logsumexp((2, 4))
    return out.view(batch, heads, query_blocks, key_blocks)


def share_mass(scores: Tensor) -> Tensor:
    """Block scores [..., nk] as shares of a row's softmax mass; rows without any key have none."""
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
