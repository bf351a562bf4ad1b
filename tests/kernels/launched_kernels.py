"""A kernel for tests of launches."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["span"])
def copy_kernel(p_in, p_out, p_none, size, stride, span, eps, TILE: tl.constexpr):
    """Copies a row, plus `eps`."""
    o = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(p_in + o * stride, mask=o < size, other=0.0)
    tl.store(p_out + o, x.to(p_out.dtype.element_ty) + eps, mask=o < span)
