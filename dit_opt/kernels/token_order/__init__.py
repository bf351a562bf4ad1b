"""Token orders: permutations of the token axis, and moving tokens into and out of them.

Importing this package registers the ops, so that no registration ever happens while a model is
being traced.
"""

from __future__ import annotations

from dit_opt.kernels.token_order import op
from dit_opt.kernels.token_order.cube_order import build_cube_order, make_cube_order
from dit_opt.kernels.token_order.reference import gather_bias, gather_tokens, scatter_tokens

__all__ = [
    "build_cube_order",
    "gather_bias",
    "gather_tokens",
    "make_cube_order",
    "op",
    "scatter_tokens",
]
