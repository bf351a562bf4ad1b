"""Kernels that do not compile, each in its own way, as `aot.load_kernel` looks them up."""

from __future__ import annotations

import os
import time


def __getattr__(name: str) -> None:
    if name == "aborts":
        os.abort()
    if name == "hangs":
        time.sleep(300)
    raise ValueError("the pass manager failed\nand says why")
