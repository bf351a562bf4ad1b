"""One graph of several that make a model, bound anew for each layout that its tokens have.

A block sees the number of its tokens, not how they lie: landscape and portrait are one graph to
Dynamo, but their plans differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dit_opt.runtime.bound import Bound
from dit_opt.runtime.handover import Spans, told_spans
from dit_opt.runtime.positions import read_grid
from dit_opt.runtime.state import running_grid

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Told:
    """What a graph is told of the tokens of a call.

    Attributes:
        grid: (T, H, W) of the whole model, under regional compilation.
        spans: by position of the argument, how the tokens lie in what an earlier graph returned.
        numbered: the grids that the numbers of the tokens tell, one for each of the arguments that
            may hold such numbers.
    """

    grid: Grid | None = None
    spans: tuple[tuple[int, Spans], ...] = ()
    numbered: tuple[Grid | None, ...] = ()

    def __bool__(self) -> bool:
        return self.grid is not None or bool(self.spans) or bool(self.numbered)


def read_told(
    args: Sequence[Any],
    places: Sequence[int],
    positions: Sequence[tuple[int, int, int, int]] = (),
) -> Told:
    """What the model that runs, and the arguments of a call, tell of the tokens.

    `places` are those of the arguments that are not the model's own; `positions`, (place, dim,
    start, stop), where the numbers of tokens may stand.
    """
    return Told(
        running_grid(),
        tuple(told_spans((i, args[i]) for i in places).items()),
        tuple(read_grid(args[i], *where) for i, *where in positions),
    )


class ByLayout:
    """The callable that Dynamo runs for such a graph.

    Args:
        bind: compiles the graph for what it is told; called once for each, on first use.
        told: in the first call. first: the bound graph of that call.
        places, positions: as for `read_told`.
    """

    def __init__(
        self,
        bind: Callable[[Told], Bound],
        told: Told,
        first: Bound,
        places: Sequence[int],
        positions: Sequence[tuple[int, int, int, int]],
    ):
        self._bind = bind
        self._places, self._positions = places, positions
        self._bounds: dict[Told, Bound] = {told: first}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        told = read_told(args, self._places, self._positions)
        if told not in self._bounds:
            with self._lock:
                if told not in self._bounds:
                    self._bounds[told] = self._bind(told)
        return self._bounds[told](*args)
