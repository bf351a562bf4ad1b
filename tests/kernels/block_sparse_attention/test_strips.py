"""Regrouping of plans: every kept pair of blocks must appear in exactly one bucket."""

from __future__ import annotations

import torch

from dit_opt.kernels.block_sparse_attention.impl.torch.strips import find_buckets

from .plans import make_plan


def rebuild(buckets, heads: int, blocks: tuple[int, int], sizes: tuple[int, int, int, int]):
    """The block mask that the buckets cover, counted per pair."""
    queries, keys, block_q, block_k = sizes
    seen = torch.zeros(heads, *blocks, dtype=torch.int64)
    for bucket in buckets:
        rows = -(-bucket.query_tokens // block_q)
        for head, first, kept in zip(bucket.heads, bucket.first, bucket.lists, strict=True):
            last_query = min(queries, (int(first) + rows) * block_q)
            assert bucket.query_tokens == last_query - int(first) * block_q
            tokens = sum(min(keys, (j + 1) * block_k) - j * block_k for j in kept.tolist())
            assert bucket.key_tokens == tokens
            steps = kept.diff()
            assert bucket.contiguous == bool((steps == 1).all())
            seen[head, first : first + rows, kept] += 1
    return seen


def test_buckets_cover_a_ragged_plan_exactly_once():
    mask = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 1, 2] = False
    sizes = (5 * 64 - 11, 7 * 32 - 5, 64, 32)
    counts, indices = make_plan(mask)
    buckets = list(find_buckets(counts, indices, 2, *sizes))
    assert torch.equal(rebuild(buckets, 6, (5, 7), sizes), mask.flatten(0, 1).long())


def test_lists_of_nearly_equal_length_share_a_bucket():
    counts = torch.arange(1, 33, dtype=torch.int32).view(1, 1, 32)
    indices = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)).argsort(-1).int()
    unused = torch.arange(64) >= counts.view(-1, 1)
    indices = indices.masked_fill(unused, 2**30).sort(-1).values.view(1, 1, 32, 64)
    sizes = (32 * 64, 64 * 64, 64, 64)
    apart = list(find_buckets(counts, indices, 1, *sizes))
    together = list(find_buckets(counts, indices, 1, *sizes, fill=True))
    assert len(apart) == 32 and len(together) <= 24
    seen = {}
    for bucket in together:
        kept = bucket.counts or [bucket.lists.shape[1]] * len(bucket.lists)
        assert bucket.key_tokens == 64 * bucket.lists.shape[1]
        assert max(kept) <= bucket.lists.shape[1] < 1.15 * min(kept) + 1
        for row, count, blocks in zip(bucket.first.tolist(), kept, bucket.lists.tolist()):
            seen[row] = blocks[:count]
            # What fills a list up can be gathered.
            assert max(blocks) < 64
    assert seen == {row: indices[0, 0, row, : row + 1].tolist() for row in range(32)}


def test_ragged_and_shared_rows_are_not_filled_up():
    mask = torch.zeros(1, 1, 6, 24, dtype=torch.bool)
    mask[0, 0, 0, :8] = mask[0, 0, 1, 7:] = mask[0, 0, 2, :19] = True
    mask[0, 0, 3:, :17] = True
    sizes = (6 * 64, 24 * 64 - 7, 64, 64)
    buckets = list(find_buckets(*make_plan(mask), 1, *sizes, fill=True))
    found = {(b.query_tokens, b.key_tokens, tuple(b.counts or ())) for b in buckets}
    # Of 8, 17, 19 and 17 blocks only the third list is filled up, to 20.
    ragged, shared = (64, 17 * 64 - 7, ()), (192, 17 * 64, ())
    assert found == {(64, 512, ()), ragged, (64, 20 * 64, (19,)), shared}


def test_a_plan_for_one_batch_serves_all():
    mask = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    sizes = (192, 256, 64, 64)
    buckets = list(find_buckets(*make_plan(mask), 3, *sizes))
    expected = mask.expand(3, -1, -1, -1).flatten(0, 1).long()
    assert torch.equal(rebuild(buckets, 6, (3, 4), sizes), expected)


def test_equal_neighbours_become_one_run():
    mask = torch.zeros(1, 1, 6, 4, dtype=torch.bool)
    mask[0, 0, :4, 1:3] = True
    mask[0, 0, 4:, ::2] = True
    buckets = list(find_buckets(*make_plan(mask), 1, 6 * 64, 4 * 64, 64, 64))
    found = {(b.query_tokens, b.key_tokens, b.contiguous) for b in buckets}
    assert found == {(256, 128, True), (128, 128, False)}


def test_an_empty_plan_has_no_buckets():
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    assert list(find_buckets(*make_plan(mask), 1, 192, 256, 64, 64)) == []
