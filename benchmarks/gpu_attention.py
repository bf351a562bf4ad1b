"""The attention part of the GPU benchmark: ceilings, correctness, and speed beside every rival."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention import FLEX
from benchmarks.gpu_cases import Case, make_inputs, make_key_mask, make_plan, measure_density
from benchmarks.gpu_timing import time_captured
from benchmarks.problems import TOLERANCE, make_block_mask
from dit_opt.kernels.block_sparse_attention import block_sparse_attention
from dit_opt.kernels.block_sparse_attention.impl.triton.tuning import find_tiling

OURS, DEFAULT = "ditopt", "sdpa_default"
# Rows of an output that are compared with float64.
ROWS = 64
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def measure_ceilings(device: torch.device, seconds: float = 2.0) -> dict[str, float]:
    """What the device does at best: bf16 products in TFLOP/s, copies in TB/s (read and written)
    from its memory and from its second-level cache."""
    size, large, small = (8192, 1 << 30, 4 << 20) if device.type == "cuda" else (512, 1 << 22, 4096)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(large // 2, device=device)
    target = torch.empty_like(source)
    times = time_captured(
        {
            "matmul": lambda: a @ b,
            "memory": lambda: target.copy_(source),
            "cache": lambda: target[:small].copy_(source[:small]),
        },
        seconds,
        device,
    )
    return {
        "matmul_tflops": 2 * size**3 / times["matmul"].median / 1e9,
        "memory_tb_per_s": 2 * source.nbytes / times["memory"].median / 1e9,
        "cache_tb_per_s": 2 * 4 * small / times["cache"].median / 1e9,
    }


def sample_rows(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, case: Case
) -> tuple[list[tuple[int, int]], Tensor]:
    """Some (head, query) and their outputs `[ROWS, D]` in float64, by the specification."""
    generator = torch.Generator().manual_seed(2)
    heads = torch.randint(case.heads, (ROWS,), generator=generator).tolist()
    queries = torch.randint(case.tokens, (ROWS,), generator=generator).tolist()
    # the ragged end is where kernels go wrong
    queries[0] = case.tokens - 1
    blocks = torch.arange(case.tokens, device=q.device) // case.block_k
    mask = make_key_mask(case, q.device)
    outs = []
    for head, query in zip(heads, queries, strict=True):
        row = query // case.block_q
        kept = indices[0, head, row, : int(counts[0, head, row])]
        scores = k[0, head].double() @ q[0, head, query].double() * case.dim**-0.5
        scores = scores.masked_fill(~torch.isin(blocks, kept), -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        outs.append(scores.softmax(0) @ v[0, head].double())
    return list(zip(heads, queries, strict=True)), torch.stack(outs)


def measure_error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, case: Case
) -> float:
    """Of sampled rows of an output, relative to float64, in L2."""
    places, expected = sample_rows(q, k, v, counts, indices, case)
    found = torch.stack([out[0, head, query] for head, query in places]).double()
    return float((found - expected).norm() / expected.norm())


def bind_ours(
    case: Case, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Our kernel on a plan, as a call without arguments."""
    blocks = {"block_q": case.block_q, "block_k": case.block_k}
    mask, bias = make_key_mask(case, q.device), None
    if mask is not None:
        bias = torch.zeros(1, 1, case.tokens, device=q.device).masked_fill(~mask, -torch.inf)
    return lambda: block_sparse_attention(q, k, v, counts, indices, bias, **blocks)


def check_case(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Relative error of our kernel on sampled rows, with a poisoned allocator before it."""
    q, k, v = make_inputs(case, dtype, device)
    counts, indices = make_plan(case, device)
    # Freed at once: what the kernel allocates next holds NaN where it does not write.
    torch.full_like(q, torch.nan)
    out, _ = bind_ours(case, q, k, v, counts, indices)()
    error = measure_error(out, q, k, v, counts, indices, case)
    finite = bool(out.isfinite().all())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "relative_error": error,
        "passed": finite and error <= TOLERANCE[dtype],
    }


@functools.lru_cache(maxsize=1)
def measure_dense(
    dim: int, tokens: int, heads: int, device: torch.device, seconds: float, masked: bool = False
) -> dict[str, Any]:
    """Milliseconds of every dense kernel that takes the inputs, and why others do not."""
    case = Case(dim, tokens, heads, 1.0, masked=masked)
    inputs = make_inputs(case, torch.bfloat16, device)
    rivals, failed = drop_failing(list_dense(*inputs, make_key_mask(case, device)))
    times = time_captured(rivals, seconds, device)
    return {"times": {n: dataclasses.asdict(t) for n, t in times.items()}, "failed": failed}


def list_dense(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> dict[str, Callable[[], Tensor]]:
    """torch's kernels, the default one and each by name."""
    mask = None if key_mask is None else key_mask.view(1, 1, 1, -1)

    def attend() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def pin(backend: SDPBackend) -> Callable[[], Tensor]:
        def attend_pinned() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return attend_pinned

    default: dict[str, Callable[[], Tensor]] = {DEFAULT: attend}
    if q.device.type != "cuda":
        return default
    return default | {name: pin(backend) for name, backend in BACKENDS.items()}


def drop_failing(
    rivals: dict[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The rivals that run, and the first line of the error of each other one: compilers raise what
    is no RuntimeError, too."""
    failed = {}
    for name, call in rivals.items():
        try:
            call()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {name: call for name, call in rivals.items() if name not in failed}, failed


def measure_case(
    case: Case, device: torch.device, seconds: float, with_flex: bool = True
) -> dict[str, Any]:
    """Ours and flex_attention in turns with torch's default and the dense kernel that was fastest
    on these sizes. `eta` is the speedup over a dense kernel times the density.

    A kernel that is wrong has no speed but a reason.
    """
    dtype = torch.bfloat16
    row = check_case(case, dtype, device)
    if not row["passed"]:
        return row | {"refused": f"wrong: relative error {row['relative_error']:.3g}"}
    sizes = (case.dim, case.tokens, case.heads)
    dense = measure_dense(*sizes, device, seconds, case.masked)
    q, k, v = make_inputs(case, dtype, device)
    counts, indices = make_plan(case, device)
    baseline = dense["times"]
    fastest = min(baseline, key=lambda name: baseline[name]["median"])
    kernels = list_dense(q, k, v, make_key_mask(case, device))
    rivals: dict[str, Callable[[], Any]] = {
        **{name: kernels[name] for name in dict.fromkeys((fastest, DEFAULT))},
        OURS: bind_ours(case, q, k, v, counts, indices),
    }
    failed = {}
    if with_flex and not case.masked:
        found, failed = drop_failing(_list_flex(case, q, k, v, counts, indices))
        for name, call in found.items():
            error = measure_error(call(), q, k, v, counts, indices, case)
            if error <= TOLERANCE[dtype]:
                rivals[name] = call
            else:
                failed[name] = f"wrong: relative error {error:.3g}"
    times = time_captured(rivals, seconds, device)
    density = measure_density(case, counts)
    ours = times[OURS].median
    flex = [t.median for name, t in times.items() if name.startswith(FLEX)]
    return row | {
        "settings": dataclasses.asdict(case),
        "tiling": describe_tiling(case, dtype, device),
        "realised_density": density,
        "fastest_dense": fastest,
        "dense": dense,
        "failed": failed,
        "dense_tflops": case.dense_flops / times[fastest].median / 1e9,
        "milliseconds": {name: dataclasses.asdict(t) for name, t in times.items()},
        "speedup": times[fastest].median / ours,
        "eta": times[fastest].median / ours * density,
        "eta_vs_default": times[DEFAULT].median / ours * density,
        "speedup_vs_flex": min(flex) / ours if flex else None,
    }


def describe_tiling(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any] | None:
    """The measured tiling that our kernel takes; None where that of the table serves, as it does
    with a bias."""
    if case.masked:
        return None
    found = find_tiling(device, case.dim, dtype, case.block_q, case.block_k)
    return None if found is None else dataclasses.asdict(found)


def _list_flex(
    case: Case, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """flex_attention on the same lists, by tiles that fit our blocks and, where those fit too, by
    torch's own choice; compiled anew, since its uncompiled form ignores the lists."""
    torch.compiler.reset()
    mask = make_block_mask(counts, indices, (case.block_q, case.block_k), case.tokens)

    def bind(tiles: dict[str, int] | None) -> Callable[[], Tensor]:
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return lambda: compiled(q, k, v, block_mask=mask, kernel_options=tiles)

    calls = {FLEX: bind({"BLOCK_M": min(case.block_q, 128), "BLOCK_N": min(case.block_k, 64)})}
    if case.block_k >= 128:
        calls[f"{FLEX} own tiles"] = bind(None)
    return calls
