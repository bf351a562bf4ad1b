"""Measure the candidates of the attention kernel on this machine's GPU, and keep the fastest."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench

from dit_opt.kernels.block_sparse_attention import triton as kernel
from dit_opt.kernels.block_sparse_attention.candidates import list_candidates
from dit_opt.kernels.block_sparse_attention.tilings import Tiling, choose_tiling, pad_dim
from dit_opt.kernels.block_sparse_attention.tuning import (
    Trial,
    choose_fastest,
    make_key,
    store,
    try_candidates,
)
from dit_opt.kernels.routers.plan import list_kept

BLOCK_Q = 128
BLOCKS_K = (64, 128)


class NothingToTune(RuntimeError):
    """There is no GPU, or none whose candidates are known."""


@dataclass(frozen=True)
class Workload:
    """What the candidates attend to: random lists that keep a share `density` of all blocks.

    The last block is ragged, as those of most videos are, which is another branch of the kernel.
    """

    tokens: int = 32760
    heads: int = 24
    density: float = 0.25
    dtype: torch.dtype = torch.bfloat16


def tune_kernel(
    dims: Sequence[int], workload: Workload, device: torch.device
) -> tuple[dict[str, list[Trial]], Path]:
    """The trials of each shape, by its key, and the file that holds the winners now.

    Raises NothingToTune on a machine without a Hopper GPU.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise NothingToTune(
            "Tilings are measured on a GPU, and PyTorch sees none here; nothing was changed."
        )
    architecture = kernel.read_architecture(device)
    name = torch.cuda.get_device_name(device)
    itemsize = workload.dtype.itemsize
    shapes = list(itertools.product(dims, BLOCKS_K))
    candidates = {
        (dim, block_k): list_candidates(architecture, pad_dim(dim), itemsize, BLOCK_Q, block_k)
        for dim, block_k in shapes
    }
    for (dim, _), found in candidates.items():
        if not found:
            raise NothingToTune(
                f"No candidates are known for heads of {dim} on {name} ({architecture}); its "
                "tilings are those of the table. Nothing was changed."
            )
    trials: dict[str, list[Trial]] = {}
    for dim, block_k in shapes:
        default = choose_tiling(architecture, pad_dim(dim), itemsize, BLOCK_Q, block_k)
        attend = functools.partial(_attend, make_inputs(workload, dim, block_k, device))
        key = make_key(name, dim, workload.dtype, BLOCK_Q, block_k)
        trials[key] = try_candidates(default, candidates[dim, block_k], attend, _measure)
    return trials, store({key: choose_fastest(found) for key, found in trials.items()})


@dataclass(frozen=True, eq=False)
class Inputs:
    """q, k, v `[1, H, N, D]` and a plan over them."""

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    indices: Tensor
    block_k: int


def make_inputs(workload: Workload, dim: int, block_k: int, device: torch.device) -> Inputs:
    """Normal tensors in `[1, N, H, D]` memory, and rows that differ in length."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, workload.tokens, workload.heads, dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=workload.dtype)
        for _ in range(3)
    )
    rows, columns = -(-workload.tokens // BLOCK_Q), -(-workload.tokens // block_k)
    draw = torch.rand((1, workload.heads, rows, columns), generator=generator, device=device)
    # no row can keep more than everything
    spread = min(0.6, 1 / workload.density - 1)
    even = torch.rand(draw.shape[:-1], generator=generator, device=device)
    share = workload.density * (1 + spread * (2 * even - 1))
    kept = draw < share.unsqueeze(-1)
    kept[..., 0] = True
    return Inputs(*(x.transpose(1, 2) for x in (q, k, v)), *list_kept(kept), block_k)


def _attend(inputs: Inputs, tiling: Tiling) -> Tensor:
    plan = (inputs.counts, inputs.indices, None)
    scale = inputs.q.shape[-1] ** -0.5
    sizes = (BLOCK_Q, inputs.block_k)
    return kernel.launch(inputs.q, inputs.k, inputs.v, *plan, scale, *sizes, tiling=tiling)[0]


def _measure(call: Callable[[], object]) -> float:
    return do_bench(call, warmup=25, rep=100, return_mode="median")
