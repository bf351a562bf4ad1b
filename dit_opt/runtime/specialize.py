"""One graph of several that make a model, specialised to each layout that its tokens have.

A block sees the number of its tokens, not how they lie: landscape and portrait are one graph to
Dynamo, but their plans differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dit_opt.runtime.bound import Bound
from dit_opt.runtime.handover import Spans, read_spans
from dit_opt.runtime.scheduler_link import running_grid
from dit_opt.runtime.token_ids import Grid, read_grid

# (argument, dimension, start, stop) of token ids
IdsPlace: TypeAlias = "tuple[int, int, int, int]"


@dataclass(frozen=True)
class LayoutHints:
    """What is known of the tokens of a call from outside of the graph.

    Attributes:
        grid: (T, H, W) of the whole model, under regional compilation.
        spans: by position of the argument, how the tokens lie in what an earlier graph returned.
        id_grids: the grids that token ids give, one for each argument that may hold ids.
    """

    grid: Grid | None = None
    spans: tuple[tuple[int, Spans], ...] = ()
    id_grids: tuple[Grid | None, ...] = ()

    def __bool__(self) -> bool:
        return self.grid is not None or bool(self.spans) or bool(self.id_grids)


def read_hints(
    args: Sequence[Any], user_inputs: Sequence[int], token_ids: Sequence[IdsPlace] = ()
) -> LayoutHints:
    """What the model that runs, and the arguments of a call, tell of the tokens.

    `user_inputs` are the positions of the arguments that are not the model's own.
    """
    return LayoutHints(
        running_grid(),
        tuple(read_spans((i, args[i]) for i in user_inputs).items()),
        tuple(read_grid(args[i], *where) for i, *where in token_ids),
    )


class LayoutSpecializer:
    """The callable that Dynamo runs for such a graph.

    Args:
        bind: compiles the graph for some hints; called once for each, on first use.
        hints: of the first call. first: the bound graph of that call.
        user_inputs, token_ids: as for `read_hints`.
    """

    def __init__(
        self,
        bind: Callable[[LayoutHints], Bound],
        hints: LayoutHints,
        first: Bound,
        user_inputs: Sequence[int],
        token_ids: Sequence[IdsPlace],
    ):
        self._bind = bind
        self._user_inputs, self._token_ids = user_inputs, token_ids
        self._bounds: dict[LayoutHints, Bound] = {hints: first}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        hints = read_hints(args, self._user_inputs, self._token_ids)
        if hints not in self._bounds:
            with self._lock:
                if hints not in self._bounds:
                    self._bounds[hints] = self._bind(hints)
        return self._bounds[hints](*args)
