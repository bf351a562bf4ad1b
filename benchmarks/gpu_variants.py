"""The variants part of the GPU benchmark: kernels that nothing takes yet, beside the plain one.

Gluon and specialised warps can hang or overwrite memory, so each first runs in a process of its
own. What is wrong there or here has no speed, but a reason.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_attention import list_dense, measure_dense, measure_error
from benchmarks.gpu_cases import Case, make_inputs, make_plan, measure_density
from benchmarks.gpu_timing import time_captured
from benchmarks.problems import TOLERANCE
from dit_opt.kernels.block_sparse_attention.contract import Arguments
from dit_opt.kernels.block_sparse_attention.experimental import int8
from dit_opt.kernels.block_sparse_attention.impl.triton import attention as kernel
from dit_opt.kernels.block_sparse_attention.impl.triton.candidates import list_variants
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling, choose_tiling
from dit_opt.tuning.inputs import Workload
from dit_opt.tuning.variant_trial import prove

PLAIN, INT8 = "plain", "int8"
# 8 bits leave out 1.3 % of normal inputs, bfloat16 a half of a percent.
INT8_TOLERANCE = 2e-2
DTYPE = torch.bfloat16
# A video's of 81 frames in 480p, whose last block is ragged.
TOKENS = 32760
# A process that compiles takes a quarter of that.
PROOF_SECONDS = 45.0


def list_cases() -> Iterator[Case]:
    """Cases of one (D, N) stand together, because they share a dense baseline."""
    for dim, block_k, density in itertools.product((128, 64), (64, 128), (0.25, 1.0)):
        yield Case(dim, TOKENS, 24, density, block_k=block_k)


def bind_variants(
    case: Case, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """The output of the plain kernel by the table's tiling, and of each variant, as calls."""
    sizes = (case.dim**-0.5, case.block_q, case.block_k)
    arguments = Arguments(q, k, v, counts, indices, None, *sizes)

    def by(tiling: Tiling) -> Callable[[], Tensor]:
        return lambda: kernel.attend(arguments, tiling)[0]

    usual = choose_tiling("sm_90", case.dim, DTYPE.itemsize, case.block_q, case.block_k)
    calls = {PLAIN: by(usual)} | {t.variant: by(t) for t in _list_tilings(case)}
    return calls | {INT8: lambda: int8.attend(arguments)[0]}


def measure_variants(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of every variant that is right, in turns with the plain and a dense kernel."""
    proofs = {t.variant: prove_once(t, case.dim, case.tokens, device) for t in _list_tilings(case)}
    failed = {name: reason for name, reason in proofs.items() if reason}
    q, k, v = make_inputs(case, DTYPE, device)
    plan = make_plan(case, device)
    calls = bind_variants(case, q, k, v, *plan)
    errors = {}
    for name, call in calls.items():
        if name in failed:
            continue
        # Freed at once: what the kernel allocates next holds NaN where it does not write.
        torch.full_like(q, torch.nan)
        try:
            errors[name] = measure_error(call(), q, k, v, *plan, case)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not errors[name] <= (INT8_TOLERANCE if name == INT8 else TOLERANCE[DTYPE]):
            failed[name] = f"wrong: relative error {errors[name]:.3g}"
    row = {"relative_errors": errors, "failed": failed}
    if PLAIN in failed:
        return row | {"refused": f"the plain kernel: {failed[PLAIN]}"}
    dense = measure_dense(case.dim, case.tokens, case.heads, device, seconds)["times"]
    fastest = min(dense, key=lambda name: dense[name]["median"])
    rivals: dict[str, Callable[[], Any]] = {fastest: list_dense(q, k, v)[fastest]}
    rivals |= {name: call for name, call in calls.items() if name not in failed}
    times = time_captured(rivals, seconds, device)
    return row | {
        "settings": dataclasses.asdict(case),
        "realised_density": measure_density(case, plan[0]),
        "fastest_dense": fastest,
        "times": {name: dataclasses.asdict(t) for name, t in times.items()},
        "milliseconds": {name: t.median for name, t in times.items()},
        "speedup_vs_plain": {
            name: times[PLAIN].median / t.median for name, t in times.items() if name != PLAIN
        },
    }


@functools.cache
def prove_once(tiling: Tiling, dim: int, tokens: int, device: torch.device) -> str:
    """Why a variant may not run in this process; cases that differ in density share the answer."""
    workload = Workload(tokens=tokens, dtype=DTYPE)
    return prove(tiling, workload, dim, tiling.tile_k, device, PROOF_SECONDS)


def _list_tilings(case: Case) -> list[Tiling]:
    return list_variants("sm_90", case.dim, DTYPE.itemsize, case.block_q, case.block_k)
