"""Triton launches on torch's current device, where the tensors of a call need not lie."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on_own_device(
    launch: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Makes a launcher run on the GPU of its first argument; code that Inductor writes does so on
    its own. Does nothing for tensors on a processor."""

    @functools.wraps(launch)
    def run(first: Tensor, *rest: Rest.args, **options: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return launch(first, *rest, **options)

    return run
