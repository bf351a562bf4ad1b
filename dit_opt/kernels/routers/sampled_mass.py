"""The softmax mass of sampled query rows, summed over blocks of any order of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores held at once. On a CPU they should stay in the cache between matmul, softmax and sums.
_CPU_SCORE_BYTES = 1 << 21
_DEVICE_SCORE_BYTES = 1 << 28


@dataclass(frozen=True)
class Part:
    """The mass of some rows of some heads.

    `item` of the batch; `keys`, `group` and `rows`: slices of the key heads, of the query heads of
    each, and of the sampled rows. `mass` float32 [keys, blocks, group, rows].
    """

    item: int
    keys: slice
    group: slice
    rows: slice
    mass: Tensor


def measure_sampled_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    gather: Tensor,
    offsets: Tensor,
    scale: float,
    key_bias: Tensor | None = None,
) -> Iterator[Part]:
    """The mass of each of `rows` [m] in each block of keys, a few rows or heads at a time.

    By a float32 softmax over all keys, of scores in the dtype of the keys; a row without any key
    has none. `gather` int64 names the tokens of all blocks, one after the other, `offsets` int64
    [blocks] where each begins. q [B, H, N, D] and k [B, Hk, N, D] may have any strides, Hk divides
    H; key_bias is additive, [B or 1, H or 1, N].
    """
    batch, heads, _, dim = q.shape
    key_heads, tokens = k.shape[1:3]
    count, shared = rows.numel(), heads // key_heads
    # Half-precision products run in their own dtype: converting all keys would cost more than they
    # do. Processors have no fast float16.
    exact = torch.float32 if q.device.type == "cpu" and k.dtype == torch.float16 else k.dtype
    queries = (q.index_select(2, rows).float() * scale).to(exact)
    # Query heads that share a key head stand side by side, as columns of one matmul. Contiguous
    # factors, or the products run one by one, each on a copy.
    queries = queries.view(batch, key_heads, shared, count, dim).permute(0, 1, 4, 2, 3).contiguous()
    if key_bias is not None:
        key_bias = key_bias.float().expand(batch, heads, tokens).unflatten(1, (key_heads, -1))

    limit = _CPU_SCORE_BYTES if q.device.type == "cpu" else _DEVICE_SCORE_BYTES
    columns = max(1, limit // (4 * tokens))
    groups, chunks = [slice(0, shared)], [slice(0, count)]
    if shared * count > columns:
        groups = [slice(g, g + 1) for g in range(shared)]
        chunks = [slice(r, min(r + columns, count)) for r in range(0, count, columns)]
    step = max(1, columns // (shared * count))
    # One buffer for all parts: fresh memory costs a page fault for every 4 KiB.
    size = min(step, key_heads) * tokens * min(columns, shared * count)
    buffer = q.new_empty(size, dtype=torch.float32)
    for item in range(batch):
        for first in range(0, key_heads, step):
            part = slice(first, min(first + step, key_heads))
            keys = k[item, part].to(exact)
            for group in groups:
                for chunk in chunks:
                    chosen = queries[item, part, :, group, chunk]
                    scores = buffer[: len(keys) * tokens * chosen[0, 0].numel()]
                    scores = scores.view(len(keys), tokens, -1)
                    if exact == torch.float32:
                        torch.bmm(keys, chosen.flatten(2), out=scores)
                    else:
                        scores.copy_(torch.bmm(keys, chosen.flatten(2)))
                    if key_bias is not None:
                        bias = key_bias[item, part, group].transpose(1, 2).unsqueeze(-1)
                        scores.unflatten(2, (bias.shape[2], -1)).add_(bias)
                    torch.softmax(scores, 1, out=scores)
                    mass = _sum_blocks(scores, gather, offsets)
                    yield Part(item, part, group, chunk, mass.unflatten(2, chosen.shape[2:]))


def _sum_blocks(values: Tensor, gather: Tensor, offsets: Tensor) -> Tensor:
    """Sums [n, blocks, columns] of values [n, N, columns] over the tokens of each block."""
    matrices = torch.arange(values.shape[0], device=values.device)[:, None]
    indices = (gather + matrices * values.shape[1]).flatten()
    starts = (offsets + matrices * gather.numel()).flatten()
    # An embedding bag gathers and sums in one pass, without the permuted copy.
    return torch.embedding_bag(values.flatten(0, 1), indices, starts)[0].unflatten(
        0, (values.shape[0], -1)
    )
