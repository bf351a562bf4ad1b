"""How tensors are handed to the C++ kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor


def point(x: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor; null for None. The tensor must outlive the call."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def count(*numbers: int) -> list[ctypes.c_long]:
    """Whole numbers."""
    return [ctypes.c_long(n) for n in numbers]


def list_strides(*strides: Sequence[int]) -> ctypes.Array[ctypes.c_long]:
    """The strides of several tensors, one after the other."""
    flat = [n for each in strides for n in each]
    return (ctypes.c_long * len(flat))(*flat)
