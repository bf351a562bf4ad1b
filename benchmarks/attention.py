"""How fast is block-sparse attention beside the best dense kernels and flex_attention?

    python -m benchmarks.attention --device cpu --tokens 4096 --heads 8 --dim 64 --density 0.25
        --dtype float32 --json F [--seconds 20]

All kernels take turns in one process, on random lists whose length differs from row to row. Results
are checked against a reference first; no speed is printed for a kernel that is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.problems import DTYPES, TOLERANCE, Problem, make_block_mask, make_problem
from benchmarks.timing import Milliseconds, time_in_turns
from dit_opt.demo.machine import describe_machine, list_versions, read_date
from dit_opt.kernels.block_sparse_attention import block_sparse_attention, reference
from dit_opt.kernels.searches.rainfusion import op as rainfusion
from dit_opt.kernels.searches.rainfusion.tables import build_tables

OURS = "block_sparse_attention"
FLEX = "flex_attention"
DENSE = ("dense_sdpa", "dense_chunked")
# Rows of the score matrix that the chunked dense kernel holds at once.
CHUNK = 512
# Video grids (T, H, W) on which recognition is measured.
GRIDS = {1024: (4, 16, 16), 4096: (16, 16, 16), 16384: (16, 32, 32)}
RECOGNITION_TARGET = 0.95


class WrongResultError(RuntimeError):
    """A kernel's result is too far from the reference for its speed to mean anything."""


def list_kernels(problem: Problem, with_flex: bool) -> dict[str, Callable[[], Tensor]]:
    """The rivals: name -> a call without arguments that gives [1, H, N, D]."""
    q, k, v = problem.q, problem.k, problem.v
    plan = (problem.counts, problem.indices)
    block = problem.block
    kernels = {
        "dense_sdpa": lambda: scaled_dot_product_attention(q, k, v),
        "dense_chunked": make_chunked(problem),
        OURS: lambda: block_sparse_attention(q, k, v, *plan, block_q=block, block_k=block)[0],
    }
    if q.device.type == "cuda":
        kernels["dense_cudnn"] = lambda: _attend_with_cudnn(q, k, v)
    if with_flex:
        blocks = (problem.block, problem.block)
        mask = make_block_mask(*plan, blocks, q.shape[2])
        compiled = torch.compile(flex_attention, dynamic=False)
        kernels[FLEX] = lambda: compiled(q, k, v, block_mask=mask)
    return kernels


def make_chunked(problem: Problem) -> Callable[[], Tensor]:
    """Dense attention by two matrix products per 512 rows, every buffer allocated beforehand."""
    q, k, v = (x[0] for x in (problem.q, problem.k, problem.v))
    out = torch.empty_like(q)
    scores = q.new_empty((CHUNK, k.shape[1]))

    def attend() -> Tensor:
        for head in range(q.shape[0]):
            keys = k[head].mT
            for first in range(0, q.shape[1], CHUNK):
                rows = slice(first, first + CHUNK)
                queries = q[head, rows] * problem.scale
                part = torch.mm(queries, keys, out=scores[: queries.shape[0]])
                torch.softmax(part, -1, out=part)
                torch.mm(part, v[head], out=out[head, rows])
        return out.unsqueeze(0)

    return attend


def check_results(problem: Problem, kernels: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Relative error of every kernel against the reference, head by head to save memory.

    Raises:
        WrongResultError: one of them is above the tolerance of the dtype.
    """
    dtype = torch.float64 if problem.q.dtype == torch.float32 else torch.float32
    results = {name: call() for name, call in kernels.items()}
    worst = dict.fromkeys(results, 0.0)
    full = torch.arange(problem.indices.shape[-1], device=problem.q.device, dtype=torch.int32)
    for head in range(problem.q.shape[1]):
        one = slice(head, head + 1)
        inputs = [x[:, one] for x in (problem.q, problem.k, problem.v)]
        sizes = (None, problem.scale, problem.block, problem.block)
        counts, indices = problem.counts[:, one], problem.indices[:, one]
        everything = (torch.full_like(counts, len(full)), full.expand_as(indices))
        wide = [x.to(dtype) for x in inputs]
        sparse = reference.attend(*wide, counts, indices, *sizes, dtype=dtype)[0]
        dense = reference.attend(*wide, *everything, *sizes, dtype=dtype)[0]
        for name, result in results.items():
            expected = dense if name.startswith("dense") else sparse
            error = (result[:, one].to(dtype) - expected).norm() / expected.norm()
            worst[name] = max(worst[name], float(error))
    wrong = {n: e for n, e in worst.items() if not e <= TOLERANCE[problem.q.dtype]}
    if wrong:
        raise WrongResultError(
            f"These kernels are wrong, so nothing was timed: {wrong} (relative errors; "
            f"{TOLERANCE[problem.q.dtype]} is allowed for {problem.q.dtype})."
        )
    return worst


def measure_router(
    heads: int, dim: int, dtype: torch.dtype, block: int, device: str, seconds: float
) -> dict[int, float]:
    """RainFusion's recognition time as a share of the best dense attention, by token count."""
    shares = {}
    for tokens, grid in GRIDS.items():
        problem = make_problem(tokens, heads, dim, 1.0, dtype, block, device)
        tables = build_tables(*grid, 0, tokens, block, block, problem.q.device)
        rivals: dict[str, Callable[[], object]] = dict(list_kernels(problem, with_flex=False))
        del rivals[OURS]
        rivals["recognize"] = lambda p=problem, t=tables: rainfusion.recognize(
            p.q, p.k, None, p.scale, RECOGNITION_TARGET, False, t
        )
        times = time_in_turns(rivals, seconds, problem.q.device, warm_up=1)
        share = times["recognize"].median / min(
            time.median for name, time in times.items() if name != "recognize"
        )
        shares[tokens] = round(share, 5)
    return shares


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print, write; the exit status is 1 when a kernel is wrong."""
    options = read_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    sizes = (options.tokens, options.heads, options.dim)
    with torch.inference_mode():
        problem = make_problem(*sizes, options.density, dtype, options.block, options.device)
        kernels = list_kernels(problem, not options.no_flex)
        try:
            errors = check_results(problem, kernels)
        except WrongResultError as error:
            print(error, file=sys.stderr)
            return 1
        times = time_in_turns(kernels, options.seconds, problem.q.device)
        shares = {}
        if not options.no_router:
            share_seconds = options.seconds / 10
            shares = measure_router(*sizes[1:], dtype, options.block, options.device, share_seconds)
    report = make_report(options, problem, errors, times, shares)
    print_report(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def make_report(
    options: argparse.Namespace,
    problem: Problem,
    errors: dict[str, float],
    times: dict[str, Milliseconds],
    shares: dict[int, float],
) -> dict[str, Any]:
    """The JSON object: settings, machine, times and what follows from them."""
    density = problem.density()
    best = min(time.median for name, time in times.items() if name.startswith("dense"))
    ours = times[OURS].median
    settings = {name: str(x) if isinstance(x, Path) else x for name, x in vars(options).items()}
    return {
        "device": describe_machine(options.device),
        "versions": list_versions(),
        "date": read_date(),
        "settings": settings,
        "threads": torch.get_num_threads(),
        "relative_error": errors,
        "milliseconds": {name: dataclasses.asdict(time) for name, time in times.items()},
        "density": density,
        "speedup_vs_best_dense": best / ours,
        "speedup_vs_flex_attention": times[FLEX].median / ours if FLEX in times else None,
        "eta": best / ours * density,
        "router_share": shares.get(options.tokens),
        "router_share_by_tokens": shares,
    }


def print_report(report: dict[str, Any]) -> None:
    """The times as a table, then the ratios."""
    rows = [
        [name, time["median"], time["min"], time["max"], report["relative_error"][name]]
        for name, time in report["milliseconds"].items()
    ]
    print(tabulate(rows, headers=["kernel", "median ms", "min", "max", "error"], floatfmt=".3g"))
    ratios = ("density", "speedup_vs_best_dense", "speedup_vs_flex_attention", "eta")
    print(tabulate([[name, report[name]] for name in ratios], tablefmt="plain", floatfmt=".3f"))
    shares = report["router_share_by_tokens"].items()
    print(
        tabulate(
            [["router share"] + [f"{n}: {100 * s:.2f} %" for n, s in shares]], tablefmt="plain"
        )
    )


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-flex", action="store_true", help="skip the rival that compiles")
    parser.add_argument("--no-router", action="store_true", help="skip the recognition times")
    return parser.parse_args(arguments)


def _attend_with_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by cuDNN, the fastest of torch's kernels on Hopper, never the default."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


if __name__ == "__main__":
    sys.exit(main())
