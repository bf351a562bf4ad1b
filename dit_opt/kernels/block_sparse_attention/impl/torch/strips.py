"""Regroups the rows of a plan into equal pieces of work for torch's operators on a CPU.

A CPU is fast on few large matrix products: neighbouring query blocks that keep the same keys become
one strip, and strips of one shape become a bucket, which one batched product computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div

# Fewer steps pad lists more (on average by 1 / 3 STEPS of the work), more leave smaller buckets.
STEPS = 8


@dataclass(frozen=True)
class Bucket:
    """Strips of equal size: each has `query_tokens` queries and keeps `key_tokens` keys.

    Attributes:
        heads: int64 [strips], the position of each strip's head among batch * heads.
        first: int64 [strips], the first query block of each strip.
        lists: int64 [strips, blocks], the key blocks of each strip, ascending.
        counts: how many blocks each strip keeps, ascending, where lists were padded to equal
            length; else None.
        contiguous: every list is one unbroken range, so that keys can be sliced, not gathered.
    """

    query_tokens: int
    key_tokens: int
    heads: Tensor
    first: Tensor
    lists: Tensor
    counts: list[int] | None
    contiguous: bool


def find_buckets(
    counts: Tensor,
    indices: Tensor,
    batch: int,
    queries: int,
    keys: int,
    block_q: int,
    block_k: int,
    fill: bool = False,
) -> Iterator[Bucket]:
    """Group the rows of a plan by the size of their work; rows without keys are left out.

    Args:
        counts: int32 [1 or batch, H, nq]; indices: int32 [1 or batch, H, nq, capacity].
        queries, keys: numbers of tokens; the last block of either may be ragged.
        fill: pad the lists of single rows, so that rows that keep nearly as many blocks share a
            bucket. Rows that differ in their counts would otherwise be multiplied one by one.
    """
    query_blocks = counts.shape[2]
    starts = _starts_strip(counts, indices)
    counts, indices, starts = (x.expand(batch, *x.shape[1:]) for x in (counts, indices, starts))
    begin = starts.flatten().nonzero().flatten()
    end = torch.cat([begin[1:], begin.new_tensor([counts.numel()])])
    used = counts.flatten()[begin] > 0
    begin, end = begin[used], end[used]
    if begin.numel() == 0:
        return

    count = counts.flatten()[begin].long()
    lists = indices.flatten(0, 2)[begin].long()
    last = lists.gather(1, (count - 1).unsqueeze(1)).squeeze(1)
    first = begin % query_blocks
    query_tokens = ((end - begin) * block_q).minimum(queries - first * block_q)
    missing = ceil_div(keys, block_k) * block_k - keys
    key_tokens = count * block_k - torch.where((last + 1) * block_k > keys, missing, 0)
    unbroken = (last - lists[:, 0] == count - 1).long()
    room = count
    if fill:
        short = (query_tokens <= block_q) & (key_tokens == count * block_k)
        room = torch.where(short, _round_up(count).clamp(max=lists.shape[1]), count)
        key_tokens += (room - count) * block_k
        unbroken[short] = 0
        filled = torch.arange(lists.shape[1]) >= count.unsqueeze(1)
        lists = torch.where(filled, lists[:, :1], lists)

    size = (query_tokens * (lists.shape[1] * block_k + 1) + key_tokens) * 2 + unbroken
    # Within a bucket by count, so that the padding can be masked for a few strips at a time.
    order = (size * (lists.shape[1] + 1) + count).argsort(stable=True)
    lengths = size[order].unique_consecutive(return_counts=True)[1]
    columns = torch.stack([query_tokens, key_tokens, room, unbroken], 1)[order]
    of_bucket = columns[lengths.cumsum(0) - 1].tolist()
    rows = [x[order].split(lengths.tolist()) for x in (begin // query_blocks, first, lists, count)]
    for sizes, *parts in zip(of_bucket, *rows):
        yield _make_bucket(sizes, *parts)


def _make_bucket(
    sizes: list[int], heads: Tensor, first: Tensor, lists: Tensor, counts: Tensor
) -> Bucket:
    """The strips of one size: tokens of queries and keys, blocks of a list, whether unbroken."""
    query_tokens, key_tokens, blocks, is_unbroken = sizes
    kept = counts.tolist()
    return Bucket(
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        heads=heads,
        first=first,
        lists=lists[:, :blocks],
        counts=kept if kept[0] < blocks else None,
        contiguous=bool(is_unbroken),
    )


def _round_up(count: Tensor) -> Tensor:
    """Up to the next of `STEPS` even steps between two powers of two."""
    grain = (2 ** count.float().log2().floor() / STEPS).clamp(min=1).long()
    return (count + grain - 1) // grain * grain


def _starts_strip(counts: Tensor, indices: Tensor) -> Tensor:
    """Bool [B, H, nq]: the row's list differs from the one above it."""
    unused = torch.arange(indices.shape[-1]) >= counts.unsqueeze(-1)
    equal = (indices[:, :, 1:] == indices[:, :, :-1]) | unused[:, :, 1:]
    same = equal.all(-1) & (counts[:, :, 1:] == counts[:, :, :-1])
    return torch.nn.functional.pad(~same, (1, 0), value=True)
