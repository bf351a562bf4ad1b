"""Measure the candidates of the attention kernel on this machine's GPU, and keep the fastest."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench

from dit_opt.kernels.block_sparse_attention.contract import Arguments
from dit_opt.kernels.block_sparse_attention.impl.triton.attention import attend
from dit_opt.kernels.block_sparse_attention.impl.triton.candidates import (
    list_candidates,
    list_variants,
)
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import (
    Tiling,
    choose_tiling,
    pad_dim,
)
from dit_opt.kernels.block_sparse_attention.impl.triton.tuning import (
    Trial,
    choose_fastest,
    make_key,
    store,
    try_candidates,
)
from dit_opt.kernels.launch import read_architecture
from dit_opt.tuning.inputs import BLOCK_Q, Workload, make_inputs
from dit_opt.tuning.variant_trial import prove

BLOCKS_K = (64, 128)


class NothingToTune(RuntimeError):
    """There is no GPU, or none whose candidates are known."""


def tune_kernel(
    dims: Sequence[int], workload: Workload, device: torch.device, with_variants: bool = False
) -> tuple[dict[str, list[Trial]], Path]:
    """The trials of each shape, by its key, and the file that holds the winners now.

    Variants are other kernels that were never run on a GPU, so each first runs in a process of its
    own, which may stop or hang; only one that was right there is run here.

    Raises NothingToTune on a machine without a Hopper GPU.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise NothingToTune(
            "Tilings are measured on a GPU, and PyTorch sees none here; nothing was changed."
        )
    architecture = read_architecture(device)
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
        known, refused = candidates[dim, block_k], []
        # heads of other sizes are padded, which only the plain kernel does
        if with_variants and dim == pad_dim(dim):
            for tiling in list_variants(architecture, dim, itemsize, BLOCK_Q, block_k):
                reason = prove(tiling, workload, dim, block_k, device)
                if reason:
                    refused.append(Trial(tiling, None, reason))
                else:
                    known = [*known, tiling]
        by_tiling = functools.partial(_attend, make_inputs(workload, dim, block_k, device))
        key = make_key(name, dim, workload.dtype, BLOCK_Q, block_k)
        trials[key] = try_candidates(default, known, by_tiling, _measure) + refused
    return trials, store({key: choose_fastest(found) for key, found in trials.items()})


def _attend(call: Arguments, tiling: Tiling) -> Tensor:
    return attend(call, tiling)[0]


def _measure(call: Callable[[], object]) -> float:
    milliseconds = do_bench(call, warmup=25, rep=100, return_mode="median")
    assert isinstance(milliseconds, float)
    return milliseconds
