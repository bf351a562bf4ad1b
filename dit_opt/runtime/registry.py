"""The one registry of compiled graphs, for reports and resets."""

from __future__ import annotations

import weakref

from dit_opt.runtime.bound import Bound
from dit_opt.runtime.scheduler_link import forget_clocks

# in the order in which they were compiled
_bounds: weakref.WeakKeyDictionary[Bound, None] = weakref.WeakKeyDictionary()


def register(bound: Bound) -> None:
    """Remember a compiled graph for as long as Dynamo holds it."""
    _bounds[bound] = None


def live_bounds() -> list[Bound]:
    """Every compiled graph that Dynamo still holds, the earliest first."""
    return list(_bounds)


def reset() -> None:
    """Forget all state, statistics and runs; `torch.compiler.reset()` calls it too."""
    for bound in live_bounds():
        bound.forget()
    forget_clocks()
