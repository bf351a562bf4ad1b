"""Attention over per-head lists of key blocks: one op, a specification, a CPU and a Triton path.

Importing this package registers `torch.ops.ditopt.block_sparse_attention_v3`, so that no
registration ever happens while a model is being traced.
"""

from __future__ import annotations

from dit_opt.kernels.block_sparse_attention.op import block_sparse_attention
from dit_opt.kernels.block_sparse_attention.tail import Tail, summarize_blocks

__all__ = ["Tail", "block_sparse_attention", "summarize_blocks"]
