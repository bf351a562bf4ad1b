"""Compile a pipeline or a model in place, with what only its scheduler knows.

`torch.compile(model, backend="ditopt")` reads everything else from the graph.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from typing import Any, TypeVar

import torch

from dit_opt._compat import allow_recompiles
from dit_opt.model_grid import read_grid
from dit_opt.options import Options
from dit_opt.runtime.bound import read_timesteps
from dit_opt.runtime.schedule import Clock
from dit_opt.runtime.state import Announcement, announce, remember, set_running_grid

log = logging.getLogger(__name__)

# what diffusers pipelines call their denoisers; Wan 2.2 has two
DENOISERS = ("transformer", "transformer_2", "unet", "prior")

# Dynamo runs a block eagerly, and dense, after so many different shapes; its own limit is 8.
REGIONAL_SHAPES = 64

T = TypeVar("T")


def optimize(
    pipe_or_model: T,
    *,
    regional: bool = False,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> T:
    """Compile the denoisers of a pipeline, or one model, with the ditopt backend, in place.

    Args:
        pipe_or_model: a diffusers pipeline (its scheduler tells how long a trajectory is) or a
            module.
        regional: compile the repeated blocks one by one (`compile_repeated_blocks`), which is
            quicker to compile. A hook around the model then reads the step, and traces the whole
            model once for each shape, without compiling it, for the grid that no block can know.
        fullgraph, dynamic: as in `torch.compile`. But regional compilation is static unless asked
            otherwise: the grid of a block is a fact of one shape. Dynamo's `recompile_limit` is
            raised to 64 shapes for it.
        **options: see `Options`.

    Returns:
        The same object.

    Raises:
        OptionError: an option is wrong. TypeError: nothing in the object can be compiled.
    """
    Options.parse(options)
    scheduler = getattr(pipe_or_model, "scheduler", None)
    models = find_denoisers(pipe_or_model)
    for model in models:
        if regional and not hasattr(model, "compile_repeated_blocks"):
            raise TypeError(
                f"{type(model).__name__} has no compile_repeated_blocks; call optimize without "
                "regional=True to compile the whole model."
            )
    for model in models:
        announcement = Announcement(_timestep_reader(scheduler))
        announce(model, announcement)
        settings = {
            "backend": "ditopt",
            "fullgraph": fullgraph,
            "dynamic": dynamic,
            "options": dict(options),
        }
        if regional:
            model.register_forward_pre_hook(_StepHook(model, announcement), with_kwargs=True)
            if options.get("grid") is None:
                model.register_forward_pre_hook(_GridHook(model), with_kwargs=True)
                model.register_forward_hook(_GridEndHook(), always_call=True)
                settings["dynamic"] = bool(dynamic)
                allow_recompiles(REGIONAL_SHAPES)
            model.compile_repeated_blocks(**settings)
        else:
            model.compile(**settings)
        log.info("compiling %s with ditopt on its first call", type(model).__name__)
    return pipe_or_model


def find_denoisers(pipe_or_model: Any) -> list[torch.nn.Module]:
    """What `optimize` compiles in a pipeline, or the module itself. Raises TypeError for none."""
    if isinstance(pipe_or_model, torch.nn.Module):
        return [pipe_or_model]
    found = [getattr(pipe_or_model, name, None) for name in DENOISERS]
    modules = [m for m in found if isinstance(m, torch.nn.Module)]
    if not modules:
        raise TypeError(
            f"{type(pipe_or_model).__name__} is neither a module nor a pipeline with one of "
            f"{', '.join(DENOISERS)}; pass the denoising model itself."
        )
    return modules


def _timestep_reader(scheduler: Any):
    """Reads the scheduler's current timesteps, without keeping the scheduler alive."""
    if scheduler is None:
        return lambda: None
    reference = weakref.ref(scheduler)
    return lambda: getattr(reference(), "timesteps", None)


class _Hook:
    """A hook of a model whose blocks are compiled one by one; this one does nothing.

    Neither compiled blocks nor what was announced go with a model that is pickled or deep-copied:
    the copy is an ordinary model, and this is what becomes of its hooks.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _StepHook(_Hook):
    """Tells the blocks where the run stands, from the model's own `timestep` argument.

    One clock for each thread and each shape of the first tensor argument, as in a whole graph.
    """

    def __init__(self, model: torch.nn.Module, announcement: Announcement) -> None:
        self._signature = inspect.signature(model.forward)
        self._announcement = announcement

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        announcement = self._announcement
        timestep = bound.get("timestep")
        if timestep is None:
            announcement.position = None
            return
        first = next((a for a in bound.values() if isinstance(a, torch.Tensor)), None)
        shape = tuple(first.shape) if first is not None else ()
        stream = (threading.get_ident(), shape)
        clock = announcement.clocks.get(stream) or Clock()
        remember(announcement.clocks, stream, clock)
        value, rounding = read_timesteps({0: timestep})[0]
        announcement.position = clock.tick(value, announcement.timesteps(), rounding)


class _GridHook(_Hook):
    """Has the whole model tell its blocks (T, H, W) in each call."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        self._grids: dict[Any, tuple[int, int, int] | None] = {}

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        sizes = _describe_sizes({k: x for k, x in inputs.items() if k != "timestep"})
        if sizes not in self._grids:
            self._grids[sizes] = read_grid(module, args, kwargs)
            log.info("the whole model tells the grid %s to its blocks", self._grids[sizes])
        set_running_grid(self._grids[sizes])


class _GridEndHook(_Hook):
    """Ends what `_GridHook` began."""

    def __call__(self, *args: Any) -> None:
        set_running_grid(None)


def _describe_sizes(value: Any) -> Any:
    """What of the arguments of a call may tell a grid: shapes and whole numbers, hashable."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return tuple((name, _describe_sizes(x)) for name, x in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_describe_sizes, value))
    return value if isinstance(value, int) else None
