"""Graphs for tests: what Dynamo hands to a backend, without compiling anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from dit_opt.program.edit import copy_graph
from zoo.small import TinyModel


def capture(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[GraphModule]:
    """Copies of the graphs that Dynamo makes of one call, in order."""
    graphs: list[GraphModule] = []

    def record(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        # Dynamo changes its graph once the backend has returned
        graphs.append(copy_graph(gm))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=record, dynamic=dynamic)(*args, **kwargs)
    torch.compiler.reset()
    return graphs


def capture_one(function: Callable[..., Any], *args: Any, **kwargs: Any) -> GraphModule:
    """The only graph that Dynamo makes of one call."""
    graphs = capture(function, *args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


@functools.cache
def capture_tiny(make: Callable[..., TinyModel], batch: int = 2) -> tuple[TinyModel, GraphModule]:
    """A tiny model and its graph, made once for all tests: do not edit it."""
    tiny = make(batch=batch)
    return tiny, capture_one(tiny.model, **tiny.inputs)
