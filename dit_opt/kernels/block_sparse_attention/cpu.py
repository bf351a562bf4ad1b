"""Block-sparse attention for processors: batched products over gathered key blocks.

Dense library kernels are hard to beat on a CPU, so the lists are turned into small dense problems
whose keys stay in the cache, and the libraries do the arithmetic.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_opt.kernels.block_sparse_attention.contract import ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.cpu_tail import add_tail
from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.kernels.block_sparse_attention.runs import Bucket, find_buckets
from dit_opt.kernels.block_sparse_attention.tail import Tail
from dit_opt.kernels.scores import LOG2_E, SCORE_BOUND, bound_scores
from dit_opt.kernels.scratch import SCRATCH

# Per thread. Larger gathers fall out of the second-level cache and fault in fresh pages (up to 10x
# slower); smaller ones leave threads without work.
GATHER_BYTES = 1 << 20

# Per thread, of the scores of all runs that are multiplied at once.
SCORE_BYTES = 1 << 21

# With fewer queries than this, torch's flash attention takes 32 at a time and uses a second core
# badly (1.4x instead of 2x); two matrix products take over.
FLASH_QUERIES = 192


@dataclass(frozen=True)
class _Call:
    """One call, cut into blocks: [B * heads * blocks, block, ...], ragged blocks padded."""

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

    Gathered blocks go through two matrix products around a softmax, or through torch's flash
    attention where that is faster (long runs in float32) or more exact (bfloat16 with large
    scores). float16 has no fast arithmetic on processors and is computed in float32.
    """
    out, lse = new_outputs(q, with_lse)
    if q.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if q.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
        tail = None if tail is None else Tail(*(x.float() for x in tail))
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if key_bias is not None:
        key_bias = _as_blocks(key_bias.expand(batch, heads, keys).unsqueeze(-1), block_k)
    query_blocks = ceil_div(queries, block_q)
    rows = batch * heads * query_blocks
    call = _Call(
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
    fill = call.bounded if q.dtype == torch.bfloat16 else block_q < FLASH_QUERIES
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


def _as_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] as [B * H * blocks, block, D]; copies if N is ragged or x is strided.

    One copy of the keys costs less than gathering strided rows of them many times over.
    """
    missing = -x.shape[2] % block
    padded = pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return padded.view(-1, block, x.shape[3])


def _attend_slices(call: _Call, bucket: Bucket) -> None:
    """Runs that keep one unbroken range of keys: nothing is copied."""
    dim = call.q.shape[-1]
    rows = bucket.heads * call.query_blocks + bucket.first
    keys = bucket.heads // call.group * call.key_blocks + bucket.lists[:, 0]
    biases = bucket.heads * call.key_blocks + bucket.lists[:, 0]
    count = ceil_div(bucket.query_tokens, call.q.shape[1])
    kept = bucket.lists.shape[1]
    for row, key, first_bias in zip(rows.tolist(), keys.tolist(), biases.tolist(), strict=True):
        out, lse = _attend_dense(
            call,
            bucket,
            call.q[row : row + count].view(1, -1, dim),
            call.k[key : key + kept].view(1, -1, dim),
            call.v[key : key + kept].view(1, -1, dim),
            None if call.bias is None else call.bias[first_bias : first_bias + kept].view(1, -1),
        )
        call.out[row : row + count].view(-1, dim)[: bucket.query_tokens] = out[0]
        call.lse[row : row + count].view(-1)[: bucket.query_tokens] = lse[0]


def _attend_gathered(call: _Call, bucket: Bucket) -> None:
    """Runs with scattered keys: a few runs at a time, so that what is gathered stays cached."""
    runs, kept = bucket.lists.shape
    block_q, dim = call.q.shape[1:]
    block_k = call.k.shape[1]
    count = ceil_div(bucket.query_tokens, block_q)
    rows = (bucket.heads * call.query_blocks + bucket.first).unsqueeze(1) + torch.arange(count)
    keys = (bucket.heads // call.group * call.key_blocks).unsqueeze(1) + bucket.lists
    step = _choose_step(bucket, kept * block_k, dim, call.k.element_size())
    missing = count * block_q - bucket.query_tokens
    for begin in range(0, runs, step):
        part = slice(begin, begin + step)
        row, key = rows[part].flatten(), keys[part].flatten()
        bias = call.bias
        if bias is not None:
            biases = (bucket.heads[part] * call.key_blocks).unsqueeze(1) + bucket.lists[part]
            bias = bias.index_select(0, biases.flatten()).view(-1, kept * block_k)
        out, lse = _attend_dense(
            call,
            bucket,
            _gather("queries", call.q, row).view(-1, count * block_q, dim),
            _gather("keys", call.k, key).view(-1, kept * block_k, dim),
            _gather("values", call.v, key).view(-1, kept * block_k, dim),
            bias,
            None if bucket.counts is None else bucket.counts[part],
        )
        if missing:
            out, lse = pad(out, (0, 0, 0, missing)), pad(lse, (0, missing))
        call.out.index_copy_(0, row, out.reshape(-1, block_q, dim))
        if call.with_lse:
            call.lse.index_copy_(0, row, lse.reshape(-1, block_q))


def _choose_step(bucket: Bucket, keys: int, dim: int, item: int) -> int:
    """How many runs are multiplied at once: few enough for the cache, shared evenly by threads."""
    runs, threads = len(bucket.heads), torch.get_num_threads()
    most = min(GATHER_BYTES // dim, SCORE_BYTES // bucket.query_tokens) * threads // (keys * item)
    if most < threads:
        return max(1, most)
    pieces = ceil_div(runs, most - most % threads)
    return ceil_div(ceil_div(runs, pieces), threads) * threads


def _gather(name: str, blocks: Tensor, rows: Tensor) -> Tensor:
    """Some blocks, in scratch memory."""
    out = SCRATCH.take(name, blocks.dtype, len(rows), *blocks.shape[1:])
    return torch.index_select(blocks, 0, rows, out=out)


def _attend_dense(
    call: _Call,
    bucket: Bucket,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of each run, [runs, tokens, D] each, without the padding of ragged blocks."""
    q = q[:, : bucket.query_tokens]
    k, v = k[:, : bucket.key_tokens], v[:, : bucket.key_tokens]
    bias = None if bias is None else bias[:, None, : bucket.key_tokens]
    if call.bounded if q.dtype == torch.bfloat16 else bucket.query_tokens < FLASH_QUERIES:
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
    """Dense attention with float32 scores: out [runs, tokens, D] and lse [runs, tokens]."""
    mask = None if bias is None else bias.unsqueeze(1).to(q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), attn_mask=mask, scale=scale
    )
    return out.squeeze(1), lse.squeeze(1)


def _multiply(
    call: _Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Dense attention by two matrix products, with scores in the dtype of q.

    What stands behind the first `counts` blocks of a run has no weight. The results are scratch
    memory, valid until the next call.
    """
    out = SCRATCH.take("out", q.dtype, *q.shape)
    lse = SCRATCH.take("lse", torch.float32, *q.shape[:2])
    runs, keys = k.shape[:2]
    tile = SCORE_BYTES * torch.get_num_threads() // (runs * keys * q.element_size())
    tile = max(1, min(tile, q.shape[1]))
    for begin in range(0, q.shape[1], tile):
        rows = slice(begin, begin + tile)
        part = q[:, rows]
        scores = SCRATCH.take("scores", q.dtype, runs, part.shape[1], keys)
        if call.bounded and bias is None:
            # No weight can overflow, so the largest score need not be found and taken off.
            torch.baddbmm(scores, part, k.mT, beta=0, alpha=call.scale * LOG2_E, out=scores)
            torch.exp2(scores, out=scores)
            _blank(call, scores, counts, 0.0)
            # Rounded to the dtype of the scores: summing bfloat16 to float32 costs a copy.
            total = scores.sum(-1)
            if call.with_lse:
                lse[:, rows] = total.float().log()
            torch.bmm(scores, v, out=out[:, rows]).div_(total.unsqueeze(-1))
            continue
        torch.baddbmm(scores, part, k.mT, beta=0, alpha=call.scale, out=scores)
        if bias is not None:
            scores += bias
        _blank(call, scores, counts, -torch.inf)
        if call.with_lse:
            # The largest score and its weight give the denominator. Copied, because the softmax
            # overwrites the scores.
            largest = scores.amax(-1).to(torch.float32, copy=True)
            torch.softmax(scores, -1, out=scores)
            lse[:, rows] = largest - scores.amax(-1).float().log()
        else:
            torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, v, out=out[:, rows])
    return out, lse


def _blank(call: _Call, scores: Tensor, counts: list[int] | None, value: float) -> None:
    """Overwrite what stands behind the blocks that each run keeps, in ascending `counts`."""
    first = 0
    for count, equal in itertools.groupby(counts or ()):
        end = first + len(list(equal))
        scores[first:end, :, count * call.k.shape[1] :] = value
        first = end
