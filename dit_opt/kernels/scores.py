"""Constants of attention scores on a CPU: their units, the size of a tile, and a bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(x) = exp2(x * LOG2_E): CPUs and GPUs compute exp2 faster than exp.
LOG2_E = math.log2(math.e)

# Elements of the score matrix that are held at once: they should stay in the cache from one product
# to the next.
SCORE_TILE = 1 << 20

# Below this bound on |score| no softmax weight under- or overflows, and bfloat16 scores, off by up
# to 2^-9 of their size, are good enough.
SCORE_BOUND = 32.0


def bound_scores(q: Tensor, k: Tensor, scale: float) -> float:
    """Upper bound on |score| of q and k [..., D]: the longest query times the longest key.

    Reads a result on the host, so it is for CPU tensors.
    """
    longest = [torch.linalg.vector_norm(x, dim=-1).max() for x in (q, k)]
    return abs(scale) * float(longest[0]) * float(longest[1])
