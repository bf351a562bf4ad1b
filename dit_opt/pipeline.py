"""Compile a pipeline or a model in place, with what only its scheduler knows.

`torch.compile(model, backend="ditopt")` reads everything else from the graph.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any, TypeVar

import torch

# importing it registers the options of passes
import dit_opt.passes  # noqa: F401
from dit_opt._compat import allow_recompiles
from dit_opt.model_probe import ModelProbe, Path, walk_arguments
from dit_opt.options import Options
from dit_opt.runtime.scheduler_link import (
    SchedulerLink,
    link_scheduler,
    set_running_grid,
    set_running_link,
)
from dit_opt.runtime.slot_store import remember
from dit_opt.runtime.streams import Stream

log = logging.getLogger(__name__)

# what diffusers pipelines call their denoisers; Wan 2.2 has two
DENOISERS = ("transformer", "transformer_2", "unet", "prior")

# Dynamo runs a block eagerly, and dense, after so many different shapes; its own limit is 8.
REGIONAL_SHAPES = 64

# the hooks of each model whose blocks are compiled one by one
_handles: weakref.WeakKeyDictionary[torch.nn.Module, list[Any]] = weakref.WeakKeyDictionary()

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
            quicker to compile. Hooks around the model then read the step, and trace the whole
            model once for each shape, without compiling it, for the grid that no block can know.
            They take the place of those of an earlier call.
        fullgraph, dynamic: as in `torch.compile`. But regional compilation is static unless asked
            otherwise: the grid of a block is a fact of one shape. Dynamo's `recompile_limit` is
            raised to 64 shapes for it.
        **options: see `Options`.

    Returns:
        The same object.

    Raises:
        OptionError: an option is wrong. TypeError: nothing in the object can be compiled.
    """
    parsed = Options.parse(options)
    scheduler = getattr(pipe_or_model, "scheduler", None)
    models = find_denoisers(pipe_or_model)
    for model in models:
        if regional and not hasattr(model, "compile_repeated_blocks"):
            raise TypeError(
                f"{type(model).__name__} has no compile_repeated_blocks; call optimize without "
                "regional=True to compile the whole model."
            )
    for model in models:
        link = SchedulerLink(_timestep_reader(scheduler))
        link_scheduler(model, link)
        settings = {
            "backend": "ditopt",
            "fullgraph": fullgraph,
            "dynamic": dynamic,
            "options": dict(options),
        }
        for handle in _handles.pop(model, ()):
            handle.remove()
        if regional:
            probe = ModelProbe(model)
            hooks: list[_Hook] = [_StepHook(probe, link, parsed)]
            if parsed.grid is None:
                hooks.append(_GridHook(probe))
                settings["dynamic"] = bool(dynamic)
                allow_recompiles(REGIONAL_SHAPES)
            _handles[model] = [
                *(model.register_forward_pre_hook(hook, with_kwargs=True) for hook in hooks),
                model.register_forward_hook(_EndHook(), always_call=True),
            ]
            compile_blocks: Any = model.compile_repeated_blocks
            compile_blocks(**settings)
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

    Neither compiled blocks nor the link to the scheduler go with a model that is pickled or
    deep-copied: the copy is an ordinary model, and this is what becomes of its hooks.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _StepHook(_Hook):
    """Tells the blocks where the run stands, from the arguments of the model.

    The step is the argument called `timestep`, or else what the graph of the model embeds as one.
    One stream for each thread and each shape of the first tensor argument, as in a whole graph.
    """

    def __init__(self, probe: ModelProbe, link: SchedulerLink, options: Options) -> None:
        self._probe = probe
        self._link = link
        self._options = options
        self._warned = False

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        link = self._link
        set_running_link(link)
        arguments = self._probe.bind(args, kwargs)
        given = self._find_timesteps(module, args, kwargs, arguments)
        if not given:
            link.step_index = None
            self._warn_without_step(module)
            return
        tensors = (x for _, x in walk_arguments(arguments) if isinstance(x, torch.Tensor))
        first = next(tensors, None)
        shape = tuple(first.shape) if first is not None else ()
        key = (threading.get_ident(), shape, tuple(given))
        stream = link.streams.get(key) or Stream(tuple(range(len(given))))
        remember(link.streams, key, stream)
        link.step_index = stream.locate(dict(enumerate(given.values())), link.timesteps())

    def _find_timesteps(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arguments: dict[str, Any],
    ) -> dict[Path, Any]:
        """The values of a call that may be the timestep."""
        named = arguments.get("timestep")
        if named is not None:
            return {("timestep",): named}
        paths = self._probe.read(module, args, kwargs).timesteps
        return {path: x for path, x in walk_arguments(arguments) if path in paths}

    def _warn_without_step(self, module: torch.nn.Module) -> None:
        every = self._options.effective_refresh_every
        # where there is a dense start, the blocks stay dense, and say so themselves
        if every > 1 and not self._options.effective_dense_steps and not self._warned:
            log.warning(
                "No argument of %s is known to tell the denoising step, so its blocks search in "
                "every call and refresh_every=%d has no effect. Give forward the step in an "
                "argument called `timestep`, or compile the whole model (regional=False).",
                type(module).__name__,
                every,
            )
        self._warned = True


class _GridHook(_Hook):
    """Has the whole model tell its blocks (T, H, W) in each call."""

    def __init__(self, probe: ModelProbe) -> None:
        self._probe = probe

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        set_running_grid(self._probe.read(module, args, kwargs).grid)


class _EndHook(_Hook):
    """Ends what the hooks before a call began."""

    def __call__(self, *args: Any) -> None:
        set_running_grid(None)
        set_running_link(None)
