"""What every processor path needs to know of attention scores: units, tiles and a bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(x) = exp2(x * LOG2_E): processors and GPUs raise two faster than e.
LOG2_E = math.log2(math.e)

# Elements of the score matrix that are held at once: they should stay in the cache from one product
# to the next.
SCORE_TILE = 1 << 20

# Below this bound on |score| float32 weights need no maximum taken off: they lie between e^-64 and
# e^64 = 6e27, which leaves room for 10^10 times as much in a sum over keys and values.
SCORE_BOUND = 64.0

# bfloat16 scores are off by up to 2^-9 of their size; below this bound that is good enough.
BFLOAT16_SCORE_BOUND = 32.0


def bound_scores(q: Tensor, k: Tensor, scale: float) -> float:
    """Upper bound on |score| of q [B, H, Nq, D] and k [B, Hk, Nk, D], H a multiple of Hk.

    The longest query of a head times the longest key that it sees. Reads a result on the host, so
    it is for processors.
    """
    queries, keys = (torch.linalg.vector_norm(x, dim=-1).amax(-1) for x in (q, k))
    products = queries.unflatten(1, (k.shape[1], -1)) * keys.unsqueeze(-1)
    return abs(scale) * float(products.max())
