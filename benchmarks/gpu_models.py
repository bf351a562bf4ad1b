"""The model part of the GPU benchmark: steps of random-weight models in the shapes people run."""

from __future__ import annotations

import contextlib
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

DENSITY = 0.25
# Steps 0 and 1 compile, and a CUDA graph is recorded in the second call of each kind; the search
# of step 20 and the steps after the first search again are warm.
STEPS, WARM, SEARCH = 24, 12, 20
# What Inductor's baseline may use, best first; the default never picks cuDNN.
PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Shape:
    """A diffusers model class with the sizes of a released model, and fewer layers.

    Attributes:
        grid: (T, H, W) of the latent tokens. layers: of each kind of block.
        config: further arguments of the class. inputs: makes those of a call, from a grid.
        graphs: whether CUDA graphs are on ("reduce-overhead").
    """

    name: str
    model: str
    grid: tuple[int, int, int]
    layers: Mapping[str, int]
    config: Mapping[str, Any]
    inputs: Callable[[tuple[int, int, int]], dict[str, torch.Tensor]]
    graphs: bool = False

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
    """Single blocks of each model first, deeper models after them."""
    wan = ("WanTransformer3DModel", (21, 45, 80), {"ffn_dim": 13824}, _wan_inputs)
    hunyuan = (
        "HunyuanVideoTransformer3DModel",
        (30, 48, 80),
        {"num_refiner_layers": 1},
        _hunyuan_inputs,
    )
    flux = ("FluxTransformer2DModel", (1, 64, 64), {"guidance_embeds": True}, _flux_inputs)
    for graphs in (False, True):
        yield _shape("Wan-14B", wan, {"num_layers": 1}, graphs)
        yield _shape("Flux", flux, {"num_layers": 1, "num_single_layers": 1}, graphs)
        yield _shape("HunyuanVideo", hunyuan, {"num_layers": 1, "num_single_layers": 1}, graphs)
    yield _shape("HunyuanVideo", hunyuan, {"num_layers": 2, "num_single_layers": 4})
    yield _shape("Wan-14B", wan, {"num_layers": 4})
    yield _shape("Flux", flux, {"num_layers": 19, "num_single_layers": 38})


def _shape(name: str, kind: tuple, layers: dict[str, int], graphs: bool = False) -> Shape:
    model, grid, config, inputs = kind
    return Shape(name, model, grid, layers, config, inputs, graphs)


@torch.no_grad()
def measure_model(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Milliseconds of dense, search and reuse steps, and peak memory; dense Inductor and ditopt
    take turns, step by step of one trajectory."""
    torch.compiler.reset()
    model, inputs = build(shape, device)
    mode = {"mode": "reduce-overhead"} if shape.graphs else {}
    rivals = {
        "dense": torch.compile(model, dynamic=False, **mode),
        "ditopt": torch.compile(
            model, dynamic=False, backend=ditopt, options={"density": DENSITY, **mode}
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    peaks = dict.fromkeys(rivals, 0.0)
    for step in range(STEPS):
        timestep = torch.full((1,), 999.0 - 20 * step, device=device)
        if shape.model.startswith("Flux"):
            timestep /= 1000
        for name, call in rivals.items():
            fastest = sdpa_kernel(PRIORITY, set_priority=True)
            with fastest if name == "dense" else contextlib.nullcontext():
                spent, peak = _run(lambda c=call, t=timestep: c(**inputs, timestep=t), device)
            times[name].append(spent)
            peaks[name] = max(peaks[name], peak if step >= WARM else 0.0)
    return summarise(times) | {
        "tokens": shape.grid[0] * shape.grid[1] * shape.grid[2],
        "density": dit_opt.report(model).density,
        "peak_gib": peaks,
    }


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

    torch.manual_seed(0)
    with device:
        model = getattr(diffusers, shape.model)(**shape.config, **shape.layers)
        inputs = shape.inputs(shape.grid)
    model = model.to(dtype).eval().requires_grad_(False)
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    # positions are not rounded
    cast |= {k: x for k, x in inputs.items() if k.endswith("_ids")}
    return model, {**cast, "return_dict": False}


def _run(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds and peak memory in GiB of one call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3, 0.0
    torch.cuda.reset_peak_memory_stats(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.compiler.cudagraph_mark_step_begin()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated(device) / 2**30
