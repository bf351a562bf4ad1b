"""What attention costs, in symbols, and from which length on sparse attention pays.

Sizes are sympy expressions, so nothing here can add a guard to a graph.
"""

from __future__ import annotations

import sympy

# Density and kernel efficiency (speedup over the best dense kernel x density) that predictions
# assume; reports give the realised figures.
EXPECTED_DENSITY = 0.4
EFFICIENCY = 0.7
RECOGNITION_SHARE = 0.02
# Shortest sequences on which a plan is worth its search, by device type. CPU: measured break-even
# of the bucketed path. Elsewhere: the least that published systems use on GPUs.
MIN_TOKENS = {"cpu": 1024}
MIN_TOKENS_ELSEWHERE = 4096


def dense_flops(
    heads: sympy.Expr, queries: sympy.Expr, keys: sympy.Expr, dim: sympy.Expr
) -> sympy.Expr:
    """Multiply-adds of QK^T and PV, two FLOP each: `4 * (B * H) * Nq * Nk * D`."""
    return 4 * heads * queries * keys * dim


def attention_gain(density: float) -> float:
    """Predicted speedup of one attention call, recognition included."""
    return 1 / (density / EFFICIENCY + RECOGNITION_SHARE)


def min_tokens(option: int | None, device: str) -> int:
    """The `min_tokens` option, or the device's own."""
    return MIN_TOKENS.get(device, MIN_TOKENS_ELSEWHERE) if option is None else option
