"""The guard: what a plan keeps of the true attention, on a few rows, before the plan is used.

A plan that was searched some steps ago, or by an estimate, may have become wrong. Dense attention
is computed for one row of each query block; heads whose plan keeps too little of it run dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.reference import expand_lists

# The check costs rows / N of a dense call.
MAX_ROWS = 64
# A prime step through the rows of blocks, so that samples fall on all positions in a block.
_ROW_STEP = 37
# Scores held at once.
_SCORES = 1 << 22

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "guard_plan_v1(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, Tensor? key_bias, "
    "float scale, Tensor? expected, float slack, int block_q, int block_k) "
    "-> (Tensor counts, Tensor indices, Tensor kept, Tensor error, Tensor caught)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
_library.define("compare_heads_v1(Tensor out, Tensor dense) -> Tensor")


def sample_rows(queries: int, block_q: int, device: torch.device) -> Tensor:
    """Query rows to check, ascending: one of every block, or of `MAX_ROWS` blocks; int64 [m].

    Always the same ones: what a plan keeps is compared with what it kept when it was made, and on
    other rows that would differ without any change. Long sequences have blocks that are never
    checked.
    """
    blocks = ceil_div(queries, block_q)
    count = min(blocks, MAX_ROWS)
    number = torch.arange(count, device=device)
    block = number * blocks // count
    size = (queries - block * block_q).clamp(max=block_q)
    return block * block_q + number * _ROW_STEP % size


def check_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """The kept softmax mass and the relative L2 error of each head, float32 [B, H] both.

    Means over sampled rows, by a float32 softmax over all keys. The error is that of dropping the
    blocks that are not listed, without a tail; heads without any key keep everything. Both are NaN
    where a score is NaN.

    Args:
        q, k, v: [B, H, N, D] and [B, Hk, N, D]. counts, indices: a plan, [B or 1, H, ...].
        key_bias: additive float32 [B or 1, H or 1, N], or None.
    """
    batch, heads, queries, _ = q.shape
    tokens, key_blocks = k.shape[2], ceil_div(k.shape[2], block_k)
    rows = sample_rows(queries, block_q, q.device)
    counts, indices = (x.index_select(2, rows // block_q) for x in (counts, indices))
    listed = expand_lists(counts, indices, key_blocks).expand(batch, heads, -1, -1)
    sampled = q.index_select(2, rows).float() * scale
    group = heads // k.shape[1]
    kept, error = [], []
    step = max(1, _SCORES // (tokens * rows.numel()))
    for first in range(0, heads, step):
        part = slice(first, min(first + step, heads))
        shared = torch.arange(first, part.stop, device=q.device) // group
        scores = sampled[:, part] @ k.index_select(1, shared).float().mT
        bare = None
        if key_bias is not None:
            bias = key_bias.expand(-1, heads, -1)[:, part].unsqueeze(2)
            scores = scores + bias
            bare = (bias == -torch.inf).all(-1, keepdim=True)
        mass = scores.softmax(-1)
        if bare is not None:
            mass = mass.masked_fill(bare, 0.0)
        shown = listed[:, part].repeat_interleave(block_k, -1)[..., :tokens]
        inside = mass * shown
        total = inside.sum(-1, keepdim=True)
        values = v.index_select(1, shared).float()
        dense = mass @ values
        sparse = (inside / torch.where(total > 0, total, 1.0)) @ values
        if bare is not None:
            total = total.masked_fill(bare, 1.0)
        kept.append(total.squeeze(-1).mean(-1))
        norm = dense.flatten(2).norm(dim=-1)
        error.append((sparse - dense).flatten(2).norm(dim=-1) / torch.where(norm > 0, norm, 1.0))
    return torch.cat(kept, 1), torch.cat(error, 1)


@torch.library.impl(_library, "guard_plan_v1", "CompositeExplicitAutograd")
def guard_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    expected: Tensor | None,
    slack: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The plan with every block for the heads that were caught; see `check_plan`.

    Args:
        expected: the mass that a plan should keep, float32 [B, H]; None catches only heads whose
            mass is NaN, which are always caught.
        slack: how much less it may keep.

    Returns:
        counts [B, H, nq] and indices [B, H, nq, nk], then kept, error and caught (0 or 1), float32
        [B, H] each.
    """
    kept, error = check_plan(q, k, v, counts, indices, key_bias, scale, block_q, block_k)
    key_blocks = ceil_div(k.shape[2], block_k)
    if expected is None:
        caught = kept.isnan()
    else:
        # a comparison with NaN is false
        caught = ~(kept >= expected - slack)
    counts = torch.where(caught[..., None], key_blocks, counts).int()
    every = torch.arange(key_blocks, dtype=torch.int32, device=q.device)
    indices = torch.where(caught[..., None, None], every, indices)
    return counts, indices, kept, error, caught.float()


@torch.library.register_fake("ditopt::guard_plan_v1", lib=_library)
def _fake(q, k, v, counts, *arguments):
    rows, block_k = (q.shape[0], *counts.shape[1:]), arguments[-1]
    kept, error, caught = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(3))
    return (
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty((*rows, ceil_div(k.shape[2], block_k)), dtype=torch.int32),
        kept,
        error,
        caught,
    )


@torch.library.impl(_library, "compare_heads_v1", "CompositeImplicitAutograd")
def compare_heads(out: Tensor, dense: Tensor) -> Tensor:
    """The relative L2 difference of each head, float32 [B, H], of outputs [B, H, N, D] or
    [B * H, N, D] (as [B * H, 1]), without elements that are NaN in `dense`."""
    if out.dim() == 3:
        out, dense = out.unsqueeze(1), dense.unsqueeze(1)
    known = ~dense.isnan()
    dense = torch.where(known, dense, 0.0).float()
    difference = torch.where(known, out, 0.0).float() - dense
    norm = dense.flatten(2).norm(dim=-1)
    return difference.flatten(2).norm(dim=-1) / torch.where(norm > 0, norm, 1.0)
