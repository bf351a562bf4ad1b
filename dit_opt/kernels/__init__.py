"""Tensor-to-tensor kernels and the searches that feed them.

Nothing in here knows a graph: a kernel can be called, tested and timed with plain tensors.
"""

# registering ops is a side effect that must happen before any tracing
from dit_opt.kernels import block_sparse_attention, norm_rope, searches, token_order

__all__ = ["block_sparse_attention", "norm_rope", "searches", "token_order"]
