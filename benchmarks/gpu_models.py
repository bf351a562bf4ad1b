"""The model part of the GPU benchmark: steps of random-weight models in the shapes people run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_opt
from dit_opt.backend import ditopt
from dit_opt.options import DEFAULT_REFRESH_EVERY

log = logging.getLogger(__name__)

DENSITY = 0.25
# Steps 0 and 1 compile, and a CUDA graph is recorded in the second call of each kind; the search
# of step 20 and the steps after the first search again are warm.
STEPS, WARM, SEARCH = 24, 12, 20
# What Inductor's baseline may use first; one that takes no mask leaves it to the next.
FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@dataclass(frozen=True)
class Shape:
    """A diffusers model class with the sizes of a released model, and fewer layers.

    Attributes:
        grid: (T, H, W) of the latent tokens. layers: of each kind of block.
        config: further arguments of the class. inputs: makes those of a call, from a grid.
        graphs: whether CUDA graphs are on ("reduce-overhead").
        min_tokens: of ditopt's options; 0 for sizes that are not predicted to gain.
    """

    name: str
    model: str
    grid: tuple[int, int, int]
    layers: Mapping[str, int]
    config: Mapping[str, Any]
    inputs: Callable[[tuple[int, int, int]], dict[str, torch.Tensor]]
    graphs: bool = False
    min_tokens: int | None = None

    @property
    def case(self) -> str:
        """For tables and JSON."""
        depth = "+".join(map(str, self.layers.values()))
        return f"{self.name} {depth} layers" + (" CUDA graphs" if self.graphs else "")


def _wan_inputs(grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
    }


def _hunyuan_inputs(grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(1, 256, 4096),
        "encoder_attention_mask": (torch.arange(256) < 200)[None].long(),
        "pooled_projections": torch.randn(1, 768),
        "guidance": torch.tensor([6000.0]),
    }


def _flux_inputs(grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    _, h, w = grid
    ids = torch.zeros(h, w, 3)
    ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)[None]
    return {
        "hidden_states": torch.randn(1, h * w, 64),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": ids.view(h * w, 3),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.tensor([3.5]),
    }


def list_shapes() -> Iterator[Shape]:
    """The one that a bar is about first, then single blocks of the others and deeper models."""
    hunyuan = Shape(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        (30, 48, 80),
        {"num_layers": 1, "num_single_layers": 1},
        {"num_refiner_layers": 1},
        _hunyuan_inputs,
    )
    wan = Shape(
        "Wan-14B",
        "WanTransformer3DModel",
        (21, 45, 80),
        {"num_layers": 1},
        {"ffn_dim": 13824},
        _wan_inputs,
    )
    flux = Shape(
        "Flux",
        "FluxTransformer2DModel",
        (1, 64, 64),
        {"num_layers": 1, "num_single_layers": 1},
        {"guidance_embeds": True},
        _flux_inputs,
        min_tokens=0,
    )
    yield from (hunyuan, wan)
    yield from (dataclasses.replace(shape, graphs=True) for shape in (hunyuan, wan))
    yield dataclasses.replace(hunyuan, layers={"num_layers": 2, "num_single_layers": 4})
    yield flux


@torch.no_grad()
def measure_model(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Milliseconds of dense, search and reuse steps, and peak memory; dense Inductor, by the kernel
    that is fastest in this model, and ditopt take turns, step by step of one trajectory.

    Has no speed, but a reason, where nothing was replaced or an output is not a number.
    """
    model, inputs = build(shape, device)
    mode = {"mode": "reduce-overhead"} if shape.graphs else {}
    start = _make_timestep(shape, 0, device)
    first, trials = choose_dense(shape, model, inputs | {"timestep": start}, device)
    torch.compiler.reset()
    options = {"density": DENSITY, "dense_steps": 0, "min_tokens": shape.min_tokens, **mode}
    rivals = {
        "dense": torch.compile(model, dynamic=False, **mode),
        "ditopt": torch.compile(model, dynamic=False, backend=ditopt, options=options),
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    peaks = dict.fromkeys(rivals, 0.0)
    outputs: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        timestep = _make_timestep(shape, step, device)
        for name, call in rivals.items():
            with prefer(first) if name == "dense" else contextlib.nullcontext():
                out, spent, peak = _run(
                    lambda c=call, t=timestep: c(**inputs, timestep=t)[0], device
                )
            times[name].append(spent)
            peaks[name] = max(peaks[name], peak)
            outputs[name] = out.float()
    # of random weights, whose attention looks everywhere alike: not a measure of quality
    apart = (outputs["ditopt"] - outputs["dense"]).norm() / outputs["dense"].norm()
    row = {
        "tokens": shape.grid[0] * shape.grid[1] * shape.grid[2],
        "density": dit_opt.report(model).density,
        "dense_kernel": first.name,
        "dense_kernels": trials,
        "difference": apart.item(),
        "peak_gib": peaks,
        "times": times,
    }
    if row["density"] is None:
        return row | {"refused": "no attention site was replaced"}
    if not math.isfinite(row["difference"]):
        return row | {"refused": "an output is not finite"}
    return row | summarise(times)


def prefer(first: SDPBackend) -> contextlib.AbstractContextManager[Any]:
    """SDPA takes this kernel where it can, and the others in their order where not."""
    others = [b for b in (*FIRST, SDPBackend.MATH) if b is not first]
    return sdpa_kernel([first, *others], set_priority=True)


_chosen: dict[str, tuple[SDPBackend, dict[str, Any]]] = {}


def choose_dense(
    shape: Shape, model: torch.nn.Module, inputs: dict[str, Any], device: torch.device
) -> tuple[SDPBackend, dict[str, Any]]:
    """The kernel that makes a dense step of a model the fastest, and the times of all in
    milliseconds, or why one failed; found once for a name."""
    if shape.name in _chosen:
        return _chosen[shape.name]
    trials: dict[str, Any] = {}
    for backend in FIRST:
        torch.compiler.reset()
        compiled = torch.compile(model, dynamic=False)
        try:
            with prefer(backend):
                spent = [_run(lambda c=compiled: c(**inputs)[0], device)[1] for _ in range(4)]
        except Exception as error:
            log.warning("%s by %s failed: %s", shape.name, backend.name, error)
            trials[backend.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        trials[backend.name] = min(spent[1:])
        if device.type == "cpu":
            break
    timed = {name: t for name, t in trials.items() if isinstance(t, float)}
    if not timed:
        raise RuntimeError(f"No dense kernel runs {shape.name}: {trials}.")
    best = SDPBackend.__members__[min(timed, key=lambda name: timed[name])]
    _chosen[shape.name] = (best, trials)
    return _chosen[shape.name]


def _make_timestep(shape: Shape, step: int, device: torch.device) -> torch.Tensor:
    timestep = torch.full((1,), 999.0 - 20 * step, device=device)
    return timestep / 1000 if shape.model.startswith("Flux") else timestep


def summarise(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians over the warm steps, searches apart; speedups of a step that uses a plan, and of the
    mean over the steps of a plan's life."""
    dense = statistics.median(times["dense"][WARM:])
    reuse = statistics.median(times["ditopt"][i] for i in range(WARM, STEPS) if i != SEARCH)
    search, life = times["ditopt"][SEARCH], DEFAULT_REFRESH_EVERY
    return {
        "milliseconds": {"dense": dense, "reuse": reuse, "search": search},
        "cold_seconds": {name: sum(values[:2]) / 1e3 for name, values in times.items()},
        "speedup_of_a_reuse_step": dense / reuse,
        "speedup": dense * life / (reuse * (life - 1) + search),
    }


def build(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model with seeded random weights, and the inputs of a call but its timestep."""
    import diffusers

    # its imports must not make tensors on the device
    make = getattr(diffusers, shape.model)
    torch.manual_seed(0)
    with device:
        model = make(**shape.config, **shape.layers)
        inputs = shape.inputs(shape.grid)
    model = model.to(dtype).eval().requires_grad_(False)
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    # positions are not rounded
    cast |= {k: x for k, x in inputs.items() if k.endswith("_ids")}
    return model, {**cast, "return_dict": False}


def _run(call: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """What a call returns, its milliseconds, and the memory in GiB that was taken at its peak."""
    if device.type != "cuda":
        begin = time.perf_counter()
        out = call()
        return out, (time.perf_counter() - begin) * 1e3, 0.0
    torch.cuda.reset_peak_memory_stats(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.compiler.cudagraph_mark_step_begin()
    begin.record()
    out = call()
    end.record()
    end.synchronize()
    # the next replay of a CUDA graph writes to the same memory
    return out.clone(), begin.elapsed_time(end), torch.cuda.max_memory_allocated(device) / 2**30
