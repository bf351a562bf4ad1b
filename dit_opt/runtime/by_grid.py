"""One block under regional compilation, bound anew for each grid that the whole model runs on.

A block sees the number of its tokens, not how they lie: landscape and portrait are one graph to
Dynamo, but their plans differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dit_opt.runtime.bound import Bound
from dit_opt.runtime.state import running_grid

Grid = tuple[int, int, int]


class ByGrid:
    """The callable that Dynamo runs for such a block.

    Args:
        bind: compiles the block for a grid; called once for each, on first use.
        grid: the one of the first call. first: its bound graph.
    """

    def __init__(self, bind: Callable[[Grid | None], Bound], grid: Grid | None, first: Bound):
        self._bind = bind
        self._bounds: dict[Grid | None, Bound] = {grid: first}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        grid = running_grid()
        if grid not in self._bounds:
            with self._lock:
                if grid not in self._bounds:
                    self._bounds[grid] = self._bind(grid)
        return self._bounds[grid](*args)
