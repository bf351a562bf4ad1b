"""What a whole model tells its blocks where only these are compiled: the grid, and the step."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule

from dit_opt.facts.sites import find_sites
from dit_opt.facts.timestep import find_timestep
from dit_opt.facts.tokens import find_tokens

log = logging.getLogger(__name__)

# Dynamo may be switched off for good, and every attempt to trace then runs the model.
ATTEMPTS = 3

# the name of an argument of `forward`, then keys and positions inside it
Path: TypeAlias = tuple[Any, ...]


# Neither Dynamo, which may be told to suppress errors, nor the model may take it for a failure:
# what they would do then is to run the model.
class _Traced(BaseException):
    """The graph was seen; nothing needs to run."""


@dataclass(frozen=True)
class ProbeResult:
    """What the first graph of a whole model tells of a call.

    Attributes:
        grid: (T, H, W) of the latent tokens; None where it proves none, or several.
        timesteps: where the tensors are that may be the timestep; see `find_timestep`.
    """

    grid: tuple[int, int, int] | None = None
    timesteps: tuple[Path, ...] = ()


class ModelProbe:
    """What a model tells in its calls; traced once for each set of sizes.

    Whole numbers may tell a grid, as shapes do, or only count steps: those that changed and left
    the grid as it was are looked at no longer.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        # by shapes: the whole numbers of the calls that were traced, and what these told
        self._seen: dict[Any, list[tuple[list[int], ProbeResult]]] = {}
        # by shapes: which of the whole numbers tell nothing
        self._idle: dict[Any, set[int]] = {}
        self._failed = 0

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return self._signature.bind_partial(*args, **kwargs).arguments

    def read(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ProbeResult:
        """What the model tells in a call, `model(*args, **kwargs)`."""
        arguments = self.bind(args, kwargs)
        numbers: list[int] = []
        sizes = {name: x for name, x in arguments.items() if name != "timestep"}
        shapes = _describe_sizes(sizes, numbers)
        seen = self._seen.setdefault(shapes, [])
        idle = self._idle.setdefault(shapes, set())
        for others, earlier in seen:
            if _differing(numbers, others) <= idle:
                return earlier
        found = read_model(model, args, kwargs)
        if found is None:
            self._failed += 1
            if self._failed < ATTEMPTS:
                return ProbeResult()
            log.warning(
                "Dynamo made no graph of %s in %d calls, so its blocks know neither the grid of "
                "their tokens nor, unless an argument is called `timestep`, the step. Switch "
                "Dynamo on (TORCHDYNAMO_DISABLE, torch._dynamo.config.disable).",
                type(model).__name__,
                self._failed,
            )
            found = ProbeResult()
        log.info("the whole model tells the grid %s to its blocks", found.grid)
        for others, earlier in seen:
            if earlier.grid == found.grid:
                idle |= _differing(numbers, others)
        seen.append((numbers, found))
        return found


def read_model(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ProbeResult | None:
    """What a whole model tells in a call, `model(*args, **kwargs)`; None where no graph was made.

    Traces the model, but runs and compiles nothing. Tracing takes time with every block, and blocks
    of a kind see the same tokens, so a copy with one block of each kind is traced first, and the
    model itself only where that one proves no grid.
    """
    short = keep_one_of_each_block(model)
    if short is not None:
        try:
            found = _trace(short, args, kwargs)
        # A model that counts on the number of its blocks raises what it likes; the whole one tells.
        except Exception as error:
            log.debug("with one block of each kind %s raised %r", type(model).__name__, error)
        else:
            if found is not None and found.grid is not None:
                return found
    return _trace(model, args, kwargs)


def walk_arguments(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All that is in dictionaries and lists, with where it is."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        yield path, value
        return
    for key, item in items:
        yield from walk_arguments(item, (*path, key))


def keep_one_of_each_block(model: torch.nn.Module) -> torch.nn.Module | None:
    """A copy of a model whose lists of repeated blocks hold one of each kind.

    Blocks and parameters are the model's own, and the model stays as it is. Repeated are the
    classes that diffusers' `compile_repeated_blocks` compiles. None where nothing can be left out.
    """
    short = _shorten(model, frozenset(getattr(model, "_repeated_blocks", None) or ()))
    return None if short is model else short


def _shorten(module: torch.nn.Module, kinds: frozenset[str]) -> torch.nn.Module:
    kept: dict[str, torch.nn.Module | None] = {}
    seen: set[type] = set()
    is_list = isinstance(module, torch.nn.ModuleList)
    for name, child in module._modules.items():
        if is_list and type(child).__name__ in kinds:
            if type(child) in seen:
                continue
            seen.add(type(child))
        # a list is indexed by position
        kept[str(len(kept)) if is_list else name] = child and _shorten(child, kinds)
    if list(kept.values()) == list(module._modules.values()):
        return module
    short = copy.copy(module)
    short._modules = kept
    return short


def _trace(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ProbeResult | None:
    """What the first graph of a model tells; None where Dynamo made none."""
    arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    results: list[ProbeResult] = []

    def look(gm: GraphModule, inputs: list[Any]) -> Any:
        tokens = find_tokens(gm.graph, find_sites(gm.graph))
        layouts = tokens.layouts.values()
        grids = {tuple(map(int, x.grid.sizes)) for x in layouts if x.grid is not None}
        if not grids:
            # attention comes in a later graph, which is given the tokens
            rows = [row for dims in tokens.spans.values() for _, row in dims]
            grids = {grid for row in rows for _, grid in row if grid is not None}
        results.append(ProbeResult(_only(grids), _find_timesteps(gm, inputs, arguments)))
        raise _Traced

    # whatever stance the user has taken, nothing is to run here
    with torch.compiler.set_stance("default"):
        try:
            torch.compile(model.forward, backend=look, dynamic=False)(*args, **kwargs)
        except _Traced:
            return results[0]
    return None


def _only(grids: set[tuple[int, ...]]) -> tuple[int, int, int] | None:
    if len(grids) != 1:
        return None
    T, H, W = grids.pop()
    return T, H, W


def _find_timesteps(
    gm: GraphModule, inputs: list[Any], arguments: dict[str, Any]
) -> tuple[Path, ...]:
    """Where the tensors that may be the timestep are among the arguments of a call."""
    timestep = find_timestep(gm.graph)
    if timestep is None:
        return ()
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    # Dynamo hands a backend the very tensors of the call.
    paths = {id(value): path for path, value in walk_arguments(arguments)}
    found = (paths.get(id(given[node])) for node in timestep.candidates)
    return tuple(path for path in found if path is not None)


def _describe_sizes(value: Any, numbers: list[int]) -> Any:
    """What of the arguments of a call may tell a grid: shapes, hashable, and whole numbers."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return tuple((name, _describe_sizes(x, numbers)) for name, x in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_describe_sizes(x, numbers) for x in value)
    if isinstance(value, int):
        numbers.append(value)
        return int
    return None


def _differing(numbers: list[int], others: list[int]) -> set[int]:
    return {i for i, (a, b) in enumerate(zip(numbers, others, strict=True)) if a != b}
