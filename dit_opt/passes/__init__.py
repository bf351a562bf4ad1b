"""The table of contents of the compiler: every pass, in the order in which they run.

A pass is one file and one line here. Those that serve sparse modes alone come last: dense steps run
the graph as it is before them, with the very kernels that plain Inductor would have chosen.
"""

from __future__ import annotations

from dit_opt.passes.base import Pass
from dit_opt.passes.canonicalize_attention import CanonicalizeAttention
from dit_opt.passes.fold_orders import FoldOrders
from dit_opt.passes.fuse_qk import FuseQK
from dit_opt.passes.sparse_attention import SparseAttention
from dit_opt.passes.token_order import TokenOrder

PASSES: tuple[Pass, ...] = (
    CanonicalizeAttention(),
    TokenOrder(),
    FuseQK(),
    SparseAttention(),
    FoldOrders(),
)
