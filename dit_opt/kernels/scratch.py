"""Memory that the processor paths use again and again.

Fresh memory costs a page fault for every 4 KiB: a third of the time of attention where every step
of a call has its own, a tenth where every call has.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# Larger buffers are given back after a call.
KEPT_BYTES = 16 << 20


class Scratch(threading.local):
    """Buffers by name and dtype; each thread has its own, and they outlive a call."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised memory of a shape; it is valid until the same name is taken again."""
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            # An inference tensor could not be written to by a later call outside inference mode.
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=dtype)
            self.buffers[name, dtype] = buffer
        return buffer[:size].view(shape)

    def trim(self) -> None:
        """Give back what is too large to hold between calls."""
        self.buffers = {name: x for name, x in self.buffers.items() if x.nbytes <= KEPT_BYTES}


SCRATCH = Scratch()
