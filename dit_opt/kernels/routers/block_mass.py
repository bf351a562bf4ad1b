"""The exact softmax mass of every block of the score matrix, without the values: a search.

Registers `ditopt::block_mass_v1` for processors and GPUs. Source of the search with a cached
log-sum-exp: AdaSpa, arXiv 2502.21079.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.scores import LOG2_E, SCORE_BOUND, SCORE_TILE, bound_scores

# A cached log-sum-exp may be this far too low, in units of log2, before a weight is cut off. It
# keeps one stale row from ending in infinities, and the next search begins from a better one.
STALE_LIMIT = 64.0

torch.library.define(
    "ditopt::block_mass_v1",
    "(Tensor q, Tensor k, Tensor? key_bias, Tensor? lse, float scale, int block_q, int block_k) "
    "-> (Tensor mass, Tensor lse)",
    tags=(torch.Tag.flexible_layout,),
)


def measure_block_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    key_bias: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean over the rows of a block of exp(score - lse), summed over each key block.

    Args:
        q: [B, H, Nq, D]; k: [B, Hk, Nk, D], H a multiple of Hk, any strides and float dtype.
        scale: positive factor on the scores.
        key_bias: additive float32 [B or 1, H or 1, Nk]; 0 keeps a key, -inf removes it.
        lse: float32 [B, H, Nq], the log-sum-exp of an earlier step, which saves a GPU one pass of
            two. Rows then sum to how much the true sum has grown since; divide by their sums. A row
            that had no keys (-inf) counts from 0.

    Returns:
        mass float32 [B, H, nq, nk], whose rows sum to 1 without a cached lse (to 0 for rows without
        keys), and the log-sum-exp of the rows as they are now, float32 [B, H, Nq]; both scores and
        sums are float32 for every dtype.

    Raises:
        TypeError, ValueError: dtypes and shapes that do not fit together.
    """
    return torch.ops.ditopt.block_mass_v1(q, k, key_bias, lse, scale, block_q, block_k)


def measure_plainly(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """The specification: same arguments and results as the op, computed in float64 at once."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * scale
    if key_bias is not None:
        scores = scores + key_bias.double().unsqueeze(-2)
    now = scores.logsumexp(-1)
    origin = now if lse is None else lse.double()
    origin = origin.masked_fill(origin == -torch.inf, 0.0).unsqueeze(-1)
    weights = (scores - origin).clamp(max=STALE_LIMIT / LOG2_E).exp()
    rows = torch.stack([x.sum(-1) for x in weights.split(block_k, -1)], -1)
    mass = torch.stack([x.mean(-2) for x in rows.split(block_q, -2)], -2)
    return mass.float(), now.float()


@torch.library.impl("ditopt::block_mass_v1", "CPU")
def _measure_on_cpu(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    _check(q, k, key_bias, lse, scale, block_q, block_k)
    mass, found = _new_outputs(q, k, block_q, block_k)
    batch, heads, queries, dim = q.shape
    group, keys, key_blocks = heads // k.shape[1], k.shape[2], mass.shape[3]
    bias = None if key_bias is None else (key_bias * LOG2_E).expand(batch, heads, keys)
    bounded = bias is None and lse is None and bound_scores(q, k, scale) <= SCORE_BOUND
    step = max(1, SCORE_TILE // (key_blocks * block_k))
    # Zero rows fill the last block up; their weights are taken out again.
    padded = q.new_zeros((key_blocks * block_k, dim), dtype=torch.float32)
    scratch = padded.new_empty((min(step, queries), len(padded)))
    block_of = torch.arange(queries) // block_q
    mass.zero_()
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
                origin = torch.zeros(())
                if lse is not None:
                    origin = _shift(scores, (lse[item, head, rows] * LOG2_E).unsqueeze(-1))
                    scores.clamp_(max=STALE_LIMIT)
                elif not bounded:
                    origin = _shift(scores, scores[:, :keys].amax(-1, keepdim=True))
                torch.exp2(scores, out=scores)
                scores[:, keys:] = 0.0
                sums = scores.unflatten(-1, (-1, block_k)).sum(-1)
                total = sums.sum(-1, keepdim=True)
                found[item, head, rows] = (origin + total.log2()).squeeze(-1) / LOG2_E
                if lse is None:
                    sums /= torch.where(total > 0, total, 1.0)
                mass[item, head].index_add_(0, block_of[rows], sums)
    return mass.div_(block_of.bincount().unsqueeze(-1)), found


def _shift(scores: Tensor, origin: Tensor) -> Tensor:
    """Take an origin [rows, 1] off the scores in place; rows without keys (-inf) have 0."""
    origin = origin.masked_fill(origin == -torch.inf, 0.0)
    scores -= origin
    return origin


@torch.library.impl("ditopt::block_mass_v1", "CUDA")
def _measure_on_gpu(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    # Imported here because Triton is absent where there is no GPU to run it on.
    from dit_opt.kernels.routers import block_mass_triton

    _check(q, k, key_bias, lse, scale, block_q, block_k)
    return block_mass_triton.launch(q, k, key_bias, lse, scale, block_q, block_k)


@torch.library.register_fake("ditopt::block_mass_v1")
def _describe(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    return _new_outputs(q, k, block_q, block_k)


def _new_outputs(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    blocks = (ceil_div(queries, block_q), ceil_div(k.shape[2], block_k))
    mass = q.new_empty((batch, heads, *blocks), dtype=torch.float32)
    return mass, q.new_empty((batch, heads, queries), dtype=torch.float32)


def _check(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
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
    if lse is not None and (lse.shape != q.shape[:3] or lse.dtype != torch.float32):
        raise ValueError(
            f"lse must be float32 {tuple(q.shape[:3])}, not {lse.dtype} {tuple(lse.shape)}; "
            "hand back what an earlier search of the same shape returned."
        )
    if key_bias is not None:
        batch, heads = key_bias.shape[:2] if key_bias.dim() == 3 else (0, 0)
        fits = batch in (1, q.shape[0]) and heads in (1, q.shape[1])
        if not fits or key_bias.shape[2] != k.shape[2] or key_bias.dtype != torch.float32:
            raise ValueError(
                f"key_bias must be float32 [B or 1, H or 1, Nk], not {key_bias.dtype} "
                f"{tuple(key_bias.shape)}, for q {tuple(q.shape)} and k {tuple(k.shape)}."
            )
