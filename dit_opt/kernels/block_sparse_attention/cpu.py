"""Block-sparse attention for processors: batched products over gathered key blocks.

Dense library kernels are hard to beat on a CPU, so the lists are turned into small dense problems
whose keys stay in the cache, and the libraries do the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_opt.kernels.block_sparse_attention import cpu_dense
from dit_opt.kernels.block_sparse_attention.contract import ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.cpu_dense import Call, attend_dense, multiplies
from dit_opt.kernels.block_sparse_attention.cpu_tail import add_tail
from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.kernels.block_sparse_attention.runs import Bucket, find_buckets
from dit_opt.kernels.block_sparse_attention.tail import Tail
from dit_opt.kernels.native import attention as native
from dit_opt.kernels.scores import SCORE_BOUND, bound_scores
from dit_opt.kernels.scratch import SCRATCH

# Per thread. Larger gathers fall out of the second-level cache and fault in fresh pages (up to 10x
# slower); smaller ones leave threads without work.
GATHER_BYTES = 1 << 20


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
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `reference.attend`; lse is [B, H, 0] unless it is wanted.

    float32 goes to the C++ kernel of `kernels.native` where that is there and no tail is wanted.
    Else gathered blocks go through two matrix products around a softmax, or through torch's flash
    attention where that is faster (long runs in float32) or more exact (bfloat16 with large
    scores). float16 has no fast arithmetic on processors and is computed in float32.
    """
    out, lse = new_outputs(q, with_lse)
    if q.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if q.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
        tail = None if tail is None else Tail(*(x.float() for x in tail))
    if tail is None and native.can_attend(q, k, v, block_k):
        _attend_natively(q, k, v, counts, indices, key_bias, scale, block_q, block_k, out, lse)
        return out, lse
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if key_bias is not None:
        key_bias = _as_blocks(key_bias.expand(batch, heads, keys).unsqueeze(-1), block_k)
    query_blocks = ceil_div(queries, block_q)
    rows = batch * heads * query_blocks
    call = Call(
        q=_as_blocks(q, block_q),
        k=_as_blocks(k, block_k),
        v=_as_blocks(v, block_k),
        bias=None if key_bias is None else key_bias.squeeze(-1),
        out=SCRATCH.take("all out", q.dtype, rows, block_q, dim),
        lse=SCRATCH.take("all lse", torch.float32, rows, block_q),
        query_blocks=query_blocks,
        key_blocks=ceil_div(keys, block_k),
        group=heads // k.shape[1],
        scale=scale,
        bounded=bound_scores(q, k, scale) <= SCORE_BOUND,
        with_lse=with_lse or tail is not None,
    )
    if not counts.all():
        call.out.zero_()
        call.lse.fill_(-torch.inf)
    fill = multiplies(call, block_q)
    sizes = (batch, queries, keys, block_q, block_k)
    for bucket in find_buckets(counts, indices, *sizes, fill):
        if bucket.contiguous and bucket.query_tokens > block_q:
            _attend_slices(call, bucket)
        else:
            _attend_gathered(call, bucket)
    if tail is not None:
        blocks = (batch, heads, query_blocks, block_q)
        add_tail(
            call.q.view(*blocks, dim),
            tail,
            expand_lists(counts, indices, call.key_blocks),
            call.out.view(*blocks, dim),
            call.lse.view(blocks),
            scale,
            # Centroids are no longer than the longest key.
            direct=call.bounded and key_bias is None,
        )
    out.copy_(call.out.view(batch, heads, -1, dim)[:, :, :queries])
    if with_lse:
        lse.copy_(call.lse.view(batch, heads, -1)[:, :, :queries])
    SCRATCH.trim()
    return out, lse


def _attend_natively(*arguments: Any) -> None:
    """As `native.attend`, also for outputs of another dtype; an lse of no size is left out."""
    *inputs, out, lse = arguments
    made = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    native.attend(*inputs, made, lse if lse.numel() else None)
    if made is not out:
        out.copy_(made)
    SCRATCH.trim()


def _as_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] as [B * H * blocks, block, D]; copies if N is ragged or x is strided.

    One copy of the keys costs less than gathering strided rows of them many times over.
    """
    missing = -x.shape[2] % block
    padded = pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return padded.view(-1, block, x.shape[3])


def _attend_slices(call: Call, bucket: Bucket) -> None:
    """Runs that keep one unbroken range of keys: nothing is copied."""
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


def _attend_gathered(call: Call, bucket: Bucket) -> None:
    """Runs with scattered keys: a few runs at a time, so that what is gathered stays cached."""
    runs, kept = bucket.lists.shape
    block_q, dim = call.q.shape[1:]
    count = ceil_div(bucket.query_tokens, block_q)
    rows = (bucket.heads * call.query_blocks + bucket.first).unsqueeze(1) + torch.arange(count)
    keys = (bucket.heads // call.group * call.key_blocks).unsqueeze(1) + bucket.lists
    step = _choose_step(bucket, kept * call.k.shape[1], dim, call.k.element_size())
    missing = count * block_q - bucket.query_tokens
    for begin in range(0, runs, step):
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
    """How many runs are multiplied at once: few enough for the cache, shared evenly by threads."""
    runs, threads = len(bucket.heads), torch.get_num_threads()
    scores = cpu_dense.SCORE_BYTES // bucket.query_tokens
    most = min(GATHER_BYTES // dim, scores) * threads // (keys * item)
    if most < threads:
        return max(1, most)
    pieces = ceil_div(runs, most - most % threads)
    return ceil_div(ceil_div(runs, pieces), threads) * threads


def _gather(name: str, blocks: Tensor, rows: Tensor, each: int) -> Tensor:
    """Runs of `each` blocks, [runs, tokens, D], in scratch memory."""
    block, dim = blocks.shape[1:]
    out = SCRATCH.take(name, blocks.dtype, len(rows), block, dim)
    torch.index_select(blocks, 0, rows, out=out)
    # the same memory
    return SCRATCH.take(name, blocks.dtype, len(rows) // each, each * block, dim)
