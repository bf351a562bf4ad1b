"""Buffers that the CPU kernels keep from call to call.

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

# Shapes that are remembered; a plan has some 20 for each of its buffers.
KEPT_VIEWS = 1 << 10

# glibc maps larger blocks one by one, whatever was freed before.
_LARGEST_BLOCK = 31 << 20


def keep_heap() -> None:
    """Make glibc keep up to 62 MB of freed memory in this process, whatever frees it.

    glibc gives the top of its heap back to the kernel once it is twice as large as the largest
    block that was ever mapped and freed (mallopt(3), M_MMAP_THRESHOLD). A step of a small model
    ended right above that, and the next one faulted 36 MB in again, 5 % of its time. So one block
    is mapped and freed here, without being touched. Other allocators take no notice.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


class Scratch(threading.local):
    """Buffers by name and dtype; each thread has its own, and they outlive a call."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised memory of a shape; it is valid until the same name is taken again.

        Taken in another shape of the same size, it still holds what it held.
        """
        # Small pieces of work would spend a tenth of their time on making the same views again.
        known = self._views.get((name, dtype, shape))
        if known is not None:
            return known
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if not self.buffers:
            keep_heap()
        # An inference tensor could not be written to by a later call outside inference mode.
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device="cpu")
                self.buffers[name, dtype] = buffer
                self._views = {k: x for k, x in self._views.items() if k[:2] != (name, dtype)}
            view = buffer[:size].view(shape)
        self._views[name, dtype, shape] = view
        return view

    def trim(self) -> None:
        """Give back what is too large to hold between calls."""
        large = {name for name, x in self.buffers.items() if x.nbytes > KEPT_BYTES}
        for name in large:
            del self.buffers[name]
        if large or len(self._views) > KEPT_VIEWS:
            self._views = {}


SCRATCH = Scratch()
