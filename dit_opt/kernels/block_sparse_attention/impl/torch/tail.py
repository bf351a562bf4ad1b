"""The centroid tail on a CPU: a dense product with all centroids, merged into the rest.

The centroids of a head are few and the same for all of its queries. They are multiplied without
being gathered, blocks that a row keeps get weight zero, and two softmax parts merge by their lse:
nk columns per row are added, and the path of the kept blocks stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.tail import Tail
from dit_opt.kernels.scores import LOG2_E

# Elements of the scores, or of the products with the values, that are held at a time.
TILE = 1 << 19


def add_tail(
    q: Tensor,
    tail: Tail,
    kept: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    direct: bool,
) -> None:
    """Merge the dropped blocks into finished attention, in place.

    Args:
        q, out: contiguous [B, H, nq, block_q, D]; lse: float32 [B, H, nq, block_q].
        kept: bool [B or 1, H, nq, nk], blocks whose own keys are already in `out`.
        direct: no weight n * exp(score) can under- or overflow, so that they are summed as they
            are, in the dtype of q.
    """
    batch, heads, query_blocks, block_q, dim = q.shape
    blocks = kept.shape[-1]
    rows = batch * heads
    group = heads // tail.centroids.shape[1]
    centroids, values = (x.repeat_interleave(group, 1).flatten(0, 1) for x in tail[:2])
    log_lengths = tail.log_lengths.expand(batch, heads, blocks).reshape(rows, 1, blocks)
    kept = kept.expand(batch, heads, query_blocks, blocks).reshape(rows, query_blocks, blocks)
    q, out = (x.view(rows, query_blocks, block_q, dim) for x in (q, out))
    lse = lse.view(rows, query_blocks, block_q)
    if not direct:
        centroids, values = centroids.float(), values.float()
    attend = _sum_weights if direct else _attend
    alpha = scale * LOG2_E if direct else scale
    step = max(1, TILE // (rows * block_q * max(blocks, dim)))
    # Fresh buffers in every step would cost a page fault for every 4 KiB.
    buffers = [centroids.new_empty(rows * step * block_q * size) for size in (blocks, dim)]
    for begin in range(0, query_blocks, step):
        part = slice(begin, begin + step)
        lengths = log_lengths.masked_fill(kept[:, part], -torch.inf).unsqueeze(2)
        queries = q[:, part].flatten(1, 2).to(centroids.dtype)
        tokens = rows * queries.shape[1]
        scores = buffers[0][: tokens * blocks].view(rows, -1, blocks)
        products = buffers[1][: tokens * dim].view(rows, -1, dim)
        torch.baddbmm(scores, queries, centroids.mT, beta=0, alpha=alpha, out=scores)
        tail_lse = attend(scores, lengths, values, products).view_as(lse[:, part])
        tail_out = products.view_as(out[:, part]).to(out.dtype)
        # A row without any key has lse -inf in both parts, and -inf + inf is NaN.
        share = torch.sigmoid(tail_lse - lse[:, part]).nan_to_num_(0.0)
        out[:, part].lerp_(tail_out, share.unsqueeze(-1).to(out.dtype))
        lse[:, part] = torch.logaddexp(lse[:, part], tail_lse)


def _sum_weights(scores: Tensor, lengths: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Write `out` [rows, tokens, D] for lengths [rows, query blocks, 1, nk]; returns the lse.

    `scores` [rows, tokens, nk], in units of log2, is overwritten.
    """
    weights = scores.exp2_()
    # Lengths are factors here: added to rounded scores, their logarithms would be rounded too.
    weights.unflatten(1, (lengths.shape[1], -1)).mul_(lengths.exp().to(scores.dtype))
    total = weights.sum(-1)
    torch.bmm(weights, values, out=out)
    # A row that keeps every block has no weight here.
    out.div_(total.masked_fill(total == 0, 1.0).unsqueeze(-1))
    return total.float().log()


def _attend(scores: Tensor, lengths: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """The same for natural scores of any size, in float32."""
    scores.unflatten(1, (lengths.shape[1], -1)).add_(lengths)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = scores.sub_(finite.unsqueeze(-1)).exp_()
    torch.bmm(weights, values, out=out)
    return lse
