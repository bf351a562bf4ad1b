"""Runs a variant of the attention kernel where it can do no harm: in a process of its own.

Warps that wait for each other can wait forever, and a copy can overwrite what it should not; both
would take the caller along.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.impl.triton.attention import attend
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling, choose_tiling
from dit_opt.kernels.block_sparse_attention.impl.triton.tuning import TOLERANCE
from dit_opt.kernels.launch import read_architecture
from dit_opt.tuning.inputs import BLOCK_Q, Workload, make_inputs

# How often the output must be right: not every order of the warps shows a race.
REPEATS = 20
# Lengths of the first lists of each head: none, one block, and fewer and more than are buffered.
SHORT = (0, 1, 2, 3, 4)


def prove(
    tiling: Tiling,
    workload: Workload,
    dim: int,
    block_k: int,
    device: torch.device,
    seconds: float = 120.0,
) -> str:
    """Why a tiling may not be used; empty if its output was right, time after time.

    Args:
        seconds: after which the process is ended; compiling takes a few of them.
    """
    names = {"dtype": str(workload.dtype).removeprefix("torch.")}
    request = {
        "tiling": dataclasses.asdict(tiling),
        "workload": dataclasses.asdict(workload) | names,
        "dim": dim,
        "block_k": block_k,
        "device": str(device),
    }
    command = [sys.executable, "-m", "dit_opt.tuning.variant_trial", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds:g} seconds"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return f"its process ended with status {done.returncode}: {last}"
    return done.stdout.strip()


def compare(
    tiling: Tiling, workload: Workload, dim: int, block_k: int, device: torch.device
) -> str:
    """How an output by a tiling differs from that of the plain kernel; empty if it does not."""
    architecture = read_architecture(device)
    plain = choose_tiling(architecture, dim, workload.dtype.itemsize, BLOCK_Q, block_k)
    # with and without a ragged block of keys, which are two kernels, and with shared key heads
    even = -(-workload.tokens // block_k) * block_k
    for change in ({}, {"tokens": even}, {"key_heads": 1}):
        inputs = make_inputs(dataclasses.replace(workload, **change), dim, block_k, device)
        counts = inputs.counts[..., : len(SHORT)]
        counts.copy_(counts.new_tensor(SHORT[: counts.shape[-1]]).minimum(counts))
        expected = attend(inputs, plain)
        for i in range(REPEATS):
            # Freed at once: what the kernel allocates next holds NaN where it does not write.
            torch.full_like(inputs.q, torch.nan)
            reason = _find_difference(attend(inputs, tiling), expected)
            if reason:
                where = f" with {change}" if change else ""
                return f"{reason} in run {i + 1} of {REPEATS}{where}"
    return ""


def _find_difference(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """What is wrong with an output or its log-sum-exp, which is -inf for empty lists."""
    out, wanted = found[0].float(), expected[0].float()
    off = float((out - wanted).norm() / wanted.norm())
    # not the other way round, or NaN would pass
    if not off <= TOLERANCE:
        return f"its output is {off:.3g} off"
    empty = expected[1] == -torch.inf
    if not torch.equal(found[1] == -torch.inf, empty):
        return "its log-sum-exp is -inf elsewhere"
    apart = float((found[1] - expected[1]).masked_fill(empty, 0.0).abs().max())
    if not apart <= TOLERANCE:
        return f"its log-sum-exp is {apart:.3g} off"
    return ""


def main(arguments: Sequence[str]) -> None:
    """Print what `compare` finds on a request of `prove`."""
    request = json.loads(arguments[0])
    fields = request["workload"]
    workload = Workload(**fields | {"dtype": getattr(torch, fields["dtype"])})
    device = torch.device(request["device"])
    tiling = Tiling(**request["tiling"])
    found = compare(tiling, workload, request["dim"], request["block_k"], device)
    sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
