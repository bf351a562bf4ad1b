"""Attention over per-head lists of key blocks: one op, a specification, a CPU and a Triton path.

Importing this package registers `torch.ops.ditopt.block_sparse_attention_v1`, so that no
registration ever happens while a model is being traced.
"""

from __future__ import annotations

from dit_opt.kernels.block_sparse_attention.op import block_sparse_attention

__all__ = ["block_sparse_attention"]
