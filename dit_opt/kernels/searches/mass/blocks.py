"""The exact softmax mass of every block of the score matrix, without the values."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.scores import LOG2_E, SCORE_BOUND, SCORE_TILE, bound_scores


def measure_block_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The mean over the rows of a query block of their softmax mass in each key block.

    Args:
        q: [B, H, Nq, D]; k: [B, Hk, Nk, D], H a multiple of Hk, any strides and float dtype.
        scale: positive factor on the scores.
        key_bias: additive float32 [B or 1, H or 1, Nk]; 0 keeps a key, -inf removes it.

    Returns:
        float32 [B, H, nq, nk], whose rows sum to 1, or to 0 for rows without any key. Scores and
        sums are float32 for every dtype.

    Raises:
        TypeError, ValueError: dtypes and shapes that do not fit together, or on GPUs blocks that
            are no powers of two.
    """
    _check(q, k, scale, block_q, block_k, key_bias)
    if q.is_cuda:
        # Imported here because Triton is absent where there is no GPU to run it on.
        from dit_opt.kernels.searches.mass.impl.triton import sampled as triton_sampled

        return triton_sampled.measure_blocks(q, k, scale, block_q, block_k, key_bias)
    batch, heads, queries, dim = q.shape
    group, keys, key_blocks = heads // k.shape[1], k.shape[2], ceil_div(k.shape[2], block_k)
    bias = None if key_bias is None else (key_bias * LOG2_E).expand(batch, heads, keys)
    bounded = bias is None and bound_scores(q, k, scale) <= SCORE_BOUND
    step = max(1, SCORE_TILE // (key_blocks * block_k))
    # Zero keys pad the last block; their weights are set to zero again.
    padded = q.new_zeros((key_blocks * block_k, dim), dtype=torch.float32)
    scratch = padded.new_empty((min(step, queries), len(padded)))
    block_of = torch.arange(queries, device=q.device) // block_q
    mass = padded.new_zeros((batch, heads, ceil_div(queries, block_q), key_blocks))
    for item in range(batch):
        for head in range(heads):
            if head % group == 0:
                padded[:keys] = k[item, head // group]
            for first in range(0, queries, step):
                rows = slice(first, min(first + step, queries))
                part = q[item, head, rows].float() * (scale * LOG2_E)
                scores = torch.mm(part, padded.mT, out=scratch[: len(part)])
                if bias is not None:
                    scores[:, :keys] += bias[item, head]
                if not bounded:
                    most = scores[:, :keys].amax(-1, keepdim=True)
                    # rows without any key, where inf - inf would be NaN
                    scores -= most.masked_fill(most == -torch.inf, 0.0)
                torch.exp2(scores, out=scores)
                scores[:, keys:] = 0.0
                sums = scores.unflatten(-1, (-1, block_k)).sum(-1)
                total = sums.sum(-1, keepdim=True)
                sums /= torch.where(total > 0, total, 1.0)
                mass[item, head].index_add_(0, block_of[rows], sums)
    return mass.div_(block_of.bincount().unsqueeze(-1))


def _check(
    q: Tensor, k: Tensor, scale: float, block_q: int, block_k: int, key_bias: Tensor | None
) -> None:
    if q.dtype != k.dtype or not q.is_floating_point():
        raise TypeError(f"q and k must share one floating dtype, not {q.dtype} and {k.dtype}.")
    if q.dim() != 4 or k.dim() != 4 or q.shape[::3] != k.shape[::3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be [B, H, Nq, D] and k [B, Hk, Nk, D] with Hk a divisor of H, not "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    if min(q.numel(), k.numel()) == 0:
        raise ValueError(f"q {tuple(q.shape)} or k {tuple(k.shape)} is empty; there is no mass.")
    if scale <= 0 or min(block_q, block_k) < 1:
        raise ValueError(
            f"scale={scale}, block_q={block_q} and block_k={block_k} must be positive."
        )
    if key_bias is not None:
        batch, heads = key_bias.shape[:2] if key_bias.dim() == 3 else (0, 0)
        fits = batch in (1, q.shape[0]) and heads in (1, q.shape[1])
        if not fits or key_bias.shape[2] != k.shape[2] or key_bias.dtype != torch.float32:
            raise ValueError(
                f"key_bias must be float32 [B or 1, H or 1, Nk], not {key_bias.dtype} "
                f"{tuple(key_bias.shape)}, for q {tuple(q.shape)} and k {tuple(k.shape)}."
            )
