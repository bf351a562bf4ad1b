"""Block-sparse attention by torch's operators: batched products over gathered key blocks.

Dense library kernels are hard to beat on a CPU, so the lists are turned into small dense problems
whose keys stay in the cache, and the libraries do the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div
from dit_opt.kernels.block_sparse_attention.impl.torch import dense
from dit_opt.kernels.block_sparse_attention.impl.torch.dense import (
    BlockedCall,
    attend_dense,
    multiplies,
)
from dit_opt.kernels.block_sparse_attention.impl.torch.strips import Bucket, find_buckets
from dit_opt.kernels.block_sparse_attention.impl.torch.tail import add_tail
from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.kernels.block_sparse_attention.tail import Tail
from dit_opt.kernels.scores import SCORE_BOUND, bound_scores
from dit_opt.kernels.scratch import SCRATCH

# Per thread. Larger gathers fall out of the second-level cache and fault in fresh pages (up to 10x
# slower); smaller ones leave threads without work.
GATHER_BYTES = 1 << 20


def fits(call: Arguments) -> str:
    """Every call is taken."""
    return ""


def attend(call: Arguments, out: Tensor, lse: Tensor) -> None:
    """Fill `out`, of any dtype, and `lse` where the call wants it.

    Gathered blocks go through two matrix products around a softmax, or through torch's flash
    attention where that is faster or more exact, see `dense`.
    """
    batch, heads, queries, dim = call.q.shape
    block_q = call.block_q
    blocked = _cut(call)
    if not call.counts.all():
        blocked.out.zero_()
        blocked.lse.fill_(-torch.inf)
    fill = multiplies(blocked, block_q)
    sizes = (batch, queries, call.k.shape[2], block_q, call.block_k)
    for bucket in find_buckets(call.counts, call.indices, *sizes, fill):
        if bucket.contiguous and bucket.query_tokens > block_q:
            _attend_slices(blocked, bucket)
        else:
            _attend_gathered(blocked, bucket)
    if call.tail:
        blocks = (batch, heads, blocked.query_blocks, block_q)
        add_tail(
            blocked.q.view(*blocks, dim),
            Tail(*call.tail),
            expand_lists(call.counts, call.indices, blocked.key_blocks),
            blocked.out.view(*blocks, dim),
            blocked.lse.view(blocks),
            call.scale,
            # Centroids are no longer than the longest key.
            direct=blocked.bounded and call.key_bias is None,
        )
    out.copy_(blocked.out.view(batch, heads, -1, dim)[:, :, :queries])
    if call.with_lse:
        lse.copy_(blocked.lse.view(batch, heads, -1)[:, :, :queries])


def _cut(call: Arguments) -> BlockedCall:
    """The call in blocks, with outputs in scratch memory."""
    batch, heads, queries, dim = call.q.shape
    keys = call.k.shape[2]
    bias = None
    if call.key_bias is not None:
        bias = call.key_bias.expand(batch, heads, keys).unsqueeze(-1)
        bias = _as_blocks(bias, call.block_k).squeeze(-1)
    query_blocks = ceil_div(queries, call.block_q)
    rows = batch * heads * query_blocks
    return BlockedCall(
        q=_as_blocks(call.q, call.block_q),
        k=_as_blocks(call.k, call.block_k),
        v=_as_blocks(call.v, call.block_k),
        bias=bias,
        out=SCRATCH.take("all out", call.q.dtype, rows, call.block_q, dim),
        lse=SCRATCH.take("all lse", torch.float32, rows, call.block_q),
        query_blocks=query_blocks,
        key_blocks=ceil_div(keys, call.block_k),
        group=heads // call.k.shape[1],
        scale=call.scale,
        bounded=bound_scores(call.q, call.k, call.scale) <= SCORE_BOUND,
        with_lse=call.with_lse or bool(call.tail),
    )


def _as_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] as [B * H * blocks, block, D]; copies if N is ragged or x is strided.

    One copy of the keys costs less than gathering strided rows of them many times over.
    """
    missing = -x.shape[2] % block
    padded = pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return padded.view(-1, block, x.shape[3])


def _attend_slices(call: BlockedCall, bucket: Bucket) -> None:
    """Strips that keep one unbroken range of keys: nothing is copied."""
    dim = call.q.shape[-1]
    rows = bucket.heads * call.query_blocks + bucket.first
    keys = bucket.heads // call.group * call.key_blocks + bucket.lists[:, 0]
    biases = bucket.heads * call.key_blocks + bucket.lists[:, 0]
    count = ceil_div(bucket.query_tokens, call.q.shape[1])
    kept = bucket.lists.shape[1]
    for row, key, first_bias in zip(rows.tolist(), keys.tolist(), biases.tolist(), strict=True):
        out, lse = attend_dense(
            call,
            bucket,
            call.q[row : row + count].view(1, -1, dim),
            call.k[key : key + kept].view(1, -1, dim),
            call.v[key : key + kept].view(1, -1, dim),
            None if call.bias is None else call.bias[first_bias : first_bias + kept].view(1, -1),
        )
        call.out[row : row + count].view(-1, dim)[: bucket.query_tokens] = out[0]
        call.lse[row : row + count].view(-1)[: bucket.query_tokens] = lse[0]


def _attend_gathered(call: BlockedCall, bucket: Bucket) -> None:
    """Strips of scattered keys, a few at a time, so that gathered keys stay in the cache."""
    strips, kept = bucket.lists.shape
    block_q, dim = call.q.shape[1:]
    count = ceil_div(bucket.query_tokens, block_q)
    rows = (bucket.heads * call.query_blocks + bucket.first).unsqueeze(1) + torch.arange(count)
    keys = (bucket.heads // call.group * call.key_blocks).unsqueeze(1) + bucket.lists
    step = _choose_step(bucket, kept * call.k.shape[1], dim, call.k.element_size())
    missing = count * block_q - bucket.query_tokens
    for begin in range(0, strips, step):
        part = slice(begin, begin + step)
        row, key = rows[part].flatten(), keys[part].flatten()
        bias = call.bias
        if bias is not None:
            biases = (bucket.heads[part] * call.key_blocks).unsqueeze(1) + bucket.lists[part]
            bias = bias.index_select(0, biases.flatten()).view(len(biases), -1)
        out, lse = attend_dense(
            call,
            bucket,
            _gather("queries", call.q, row, count),
            _gather("keys", call.k, key, kept),
            _gather("values", call.v, key, kept),
            bias,
            None if bucket.counts is None else bucket.counts[part],
        )
        if missing:
            out, lse = pad(out, (0, 0, 0, missing)), pad(lse, (0, missing))
        call.out.index_copy_(0, row, out if count == 1 else out.reshape(-1, block_q, dim))
        if call.with_lse:
            call.lse.index_copy_(0, row, lse if count == 1 else lse.reshape(-1, block_q))


def _choose_step(bucket: Bucket, keys: int, dim: int, item: int) -> int:
    """How many strips are multiplied at once: as the cache holds, and as threads share evenly."""
    strips, threads = len(bucket.heads), torch.get_num_threads()
    scores = dense.SCORE_BYTES // bucket.query_tokens
    most = min(GATHER_BYTES // dim, scores) * threads // (keys * item)
    if most < threads:
        return max(1, most)
    pieces = ceil_div(strips, most - most % threads)
    return ceil_div(ceil_div(strips, pieces), threads) * threads


def _gather(name: str, blocks: Tensor, rows: Tensor, each: int) -> Tensor:
    """Strips of `each` blocks, [strips, tokens, D], in scratch memory."""
    block, dim = blocks.shape[1:]
    out = SCRATCH.take(name, blocks.dtype, len(rows), block, dim)
    torch.index_select(blocks, 0, rows, out=out)
    # the same memory
    return SCRATCH.take(name, blocks.dtype, len(rows) // each, each * block, dim)
