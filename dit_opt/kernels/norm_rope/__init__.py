"""The attention prologue: RMS normalisation and rotary embedding of queries or keys in one op.

Importing this package registers `torch.ops.ditopt.norm_rope_v1`, so that no registration ever
happens while a model is being traced.
"""

from __future__ import annotations

from dit_opt.kernels.norm_rope.op import norm_rope

__all__ = ["norm_rope"]
