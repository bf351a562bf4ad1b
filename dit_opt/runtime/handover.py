"""Tags on the tensors that a graph returns, where Dynamo breaks a model apart.

The tensors that a graph returns are what the next one is given, and what is known of them goes with
them: at which step they were made, and how their tokens lie. What Python makes of them in between
is another tensor, of which nothing is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dit_opt.runtime.clock import StepIndex

# (dimension, ((tokens, their (T, H, W) or None), ...)) of a tensor; made by the facts, only handed
# on here.
Spans: TypeAlias = "tuple[tuple[int, tuple[tuple[int, tuple[int, int, int] | None], ...]], ...]"


class CallTime:
    """When a graph ran; its timestep is read from the device only if a later graph asks."""

    def __init__(self, locate: Callable[[], StepIndex | None]) -> None:
        self._locate = locate

    @functools.cached_property
    def step_index(self) -> StepIndex | None:
        return self._locate()


_spans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_times: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tag_outputs(outputs: Sequence[Any], spans: Mapping[int, Spans], time: CallTime | None) -> None:
    """Note what is known of the tensors that a graph returned; `spans` by their position."""
    for i, output in enumerate(outputs):
        if not isinstance(output, torch.Tensor):
            continue
        if i in spans:
            _spans[output] = spans[i]
        if time is not None:
            _times[output] = time


def read_spans(args: Iterable[tuple[int, Any]]) -> dict[int, Spans]:
    """How the tokens of arguments lie, by position, of those that an earlier graph returned."""
    return {i: _spans[arg] for i, arg in args if isinstance(arg, torch.Tensor) and arg in _spans}


def read_call_time(args: Iterable[Any]) -> CallTime | None:
    """When the first of the arguments that an earlier graph returned was made."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg in _times:
            return _times[arg]
    return None
