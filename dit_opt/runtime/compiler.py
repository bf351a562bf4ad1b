"""Compiled graphs with the state in their signatures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.fx import Graph

from dit_opt._compat import cache_counts, compile_with_inductor, size_expression
from dit_opt.program.program import Input, Piece, SlotGraph
from dit_opt.program.sizes import read_sizes
from dit_opt.program.slots import SlotRead, SlotWrite

# The shape of a slot's value, from the graph's own arguments.
ShapeReader: TypeAlias = "Callable[[tuple[Any, ...]], list[int]]"


@dataclass(frozen=True)
class Compiled:
    """A compiled graph and the state in its signature.

    Attributes:
        run: the compiled graph.
        outputs: the number of its outputs that are no state.
        inputs: what it takes behind its own arguments, each with a reader of its shape.
        writes: where its outputs behind its own go.
        is_warm: Inductor's artifacts came from its cache.
    """

    run: Callable[..., Any]
    outputs: int
    inputs: tuple[tuple[Input, ShapeReader], ...]
    writes: tuple[SlotWrite, ...]
    is_warm: bool = False


@dataclass(frozen=True)
class CompiledPiece:
    """A piece of the program: it runs where what it writes is not valid."""

    compiled: Compiled
    arguments: tuple[int, ...]


class VariantCompiler:
    """Hands graphs to Inductor, one at a time.

    Args:
        inputs: examples of the main graph's own arguments, real while Dynamo traces, later fake.
        patches: of Inductor's configuration.
    """

    def __init__(self, inputs: Sequence[Any], patches: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self._patches = patches
        self._lock = threading.Lock()

    def compile(self, graph: SlotGraph, arguments: Sequence[int] | None = None) -> Compiled:
        """Compile a graph that takes all of the main graph's arguments, or those at positions."""
        with self._lock:
            own = self.inputs if arguments is None else [self.inputs[i] for i in arguments]
            state = [given.node.meta["example_value"] for given in graph.inputs]
            # read before Inductor takes the graph over
            inputs = tuple((given, _read_shape(given, graph.gm.graph)) for given in graph.inputs)
            hits, _ = cache_counts()
            run = compile_with_inductor(graph.gm, [*own, *state], self._patches)
            is_warm = cache_counts()[0] > hits
            return Compiled(run, graph.outputs, inputs, tuple(graph.writes), is_warm)

    def compile_piece(self, piece: Piece) -> CompiledPiece:
        """Compile a piece of a program."""
        return CompiledPiece(self.compile(piece.graph, piece.arguments), piece.arguments)


def _read_shape(given: Input, graph: Graph) -> ShapeReader:
    sizes = given.example.shape if isinstance(given, SlotRead) else ()
    return read_sizes([size_expression(size) for size in sizes], graph)
