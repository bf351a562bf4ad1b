"""The grid that a whole model tells its blocks, where only the blocks are compiled."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch.fx import GraphModule

from dit_opt._compat import BackendCompilerFailed
from dit_opt.facts.sites import find_sites
from dit_opt.facts.tokens import find_tokens

log = logging.getLogger(__name__)


class _Traced(Exception):
    """The graph was seen; nothing needs to run."""


def read_grid(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int, int] | None:
    """(T, H, W) of the latent tokens of a whole model in a call, `model(*args, **kwargs)`.

    Traces the model, but runs and compiles nothing. Tracing takes time with every block, and blocks
    of a kind see the same tokens, so a copy with one block of each kind is traced first, and the
    model itself only where that one proves no grid. None where the first graph of neither proves
    one, or where it proves several.
    """
    short = keep_one_of_each_block(model)
    if short is not None:
        try:
            grid = _trace_grid(short, args, kwargs)
        # A model that counts on the number of its blocks raises what it likes; the whole one tells.
        except Exception as error:
            log.debug("with one block of each kind %s raised %r", type(model).__name__, error)
        else:
            if grid is not None:
                return grid
    return _trace_grid(model, args, kwargs)


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


def _trace_grid(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int, int] | None:
    """The grid that the first graph of a model proves, None for none or several."""
    grids: set[tuple[int, ...]] = set()

    def look(gm: GraphModule, inputs: list[Any]) -> Any:
        layouts = find_tokens(gm.graph, find_sites(gm.graph)).layouts.values()
        grids.update(tuple(map(int, x.grid.sizes)) for x in layouts if x.grid is not None)
        raise _Traced

    try:
        torch.compile(model.forward, backend=look, dynamic=False)(*args, **kwargs)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Traced):
            raise
    if len(grids) != 1:
        return None
    T, H, W = grids.pop()
    return T, H, W
