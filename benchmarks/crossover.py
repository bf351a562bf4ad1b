"""From which length on does sparse attention pay, as measured and as the cost model predicts?

    python -m benchmarks.crossover [--device cpu] [--heads 8] [--dim 64] [--density 0.25]
        [--tokens 512 1024 2048 4096] [--seconds 5] [--json F]

Times dense attention, sparse attention over the lists of `headwise`, its search and its moves in
turns. A step is all of them, with its share of the search; the model is `dit_opt.cost`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.searches import list_searches, make_mover
from benchmarks.timing import time_in_turns
from dit_opt.demo.machine import describe_run
from dit_opt.options import DEFAULT_REFRESH_EVERY, Options
from dit_opt.policy.site_cost import predict_attention
from dit_opt.routers import AUTO, find_router
from dit_opt.routers.base import BLOCK_K, BLOCK_Q

# A GPU's dense kernels, the fastest on Hopper first.
PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def choose_grid(tokens: int) -> tuple[int, int, int]:
    """A video (T, H, W) of about so many tokens, twice as high and wide as long."""
    side = 2 * max(1, round((tokens / 4) ** (1 / 3)))
    return max(1, round(tokens / side**2)), side, side


def measure_length(
    tokens: int, heads: int, dim: int, density: float, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Milliseconds of dense attention and of a sparse step, measured and predicted."""
    grid = choose_grid(tokens)
    tokens = grid[0] * grid[1] * grid[2]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, dim, generator=generator).to(device, dtype) for _ in range(3)
    )
    rivals = list_rivals(q, k, v, grid, density)
    times = time_in_turns(rivals, seconds, device)
    median = {name: t.median for name, t in times.items()}
    step = median["sparse"] + median["moves"] + median["search"] / DEFAULT_REFRESH_EVERY
    options = Options(router=AUTO, density=density)
    model = predict_attention(heads, dim, dtype.itemsize, device, options)
    return {
        "tokens": tokens,
        "grid": list(grid),
        "milliseconds": {name: dataclasses.asdict(t) for name, t in times.items()},
        "gain": median["dense"] / step,
        "predicted_gain": model.gain(tokens),
        "predicted_milliseconds": {
            name: 1e3 * seconds
            for name, seconds in zip(("dense", "step"), model.spend(tokens), strict=True)
        },
    }


def list_rivals(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int, int], density: float
) -> dict[str, Callable[[], Any]]:
    """Dense attention, and the parts of a sparse step."""
    ops, tokens, scale = torch.ops.ditopt, q.shape[2], q.shape[-1] ** -0.5
    search = list_searches(q, k, grid, density)[AUTO]
    counts, indices, order = search()[:3]
    words = ops.pack_plan_v1(counts, indices, tokens, BLOCK_K)

    def attend_dense() -> torch.Tensor:
        if q.device.type == "cpu":
            return scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(PRIORITY, set_priority=True):
            return scaled_dot_product_attention(q, k, v)

    def attend_sparse() -> Any:
        lists = ops.unpack_plan_v1(words, tokens, BLOCK_K)
        return ops.block_sparse_attention_v3(q, k, v, *lists, None, scale, BLOCK_Q, BLOCK_K)

    moves = make_mover(q, k, v, grid, order)
    return {"dense": attend_dense, "sparse": attend_sparse, "search": search, "moves": moves}


def find_crossover(rows: list[dict[str, Any]]) -> float | None:
    """Tokens at which the measured gain passes 1 for good, between two lengths by their logarithm;
    None where it does not."""
    before = None
    for row in sorted(rows, key=lambda row: row["tokens"], reverse=True):
        if row["gain"] < 1:
            if before is None:
                return None
            low, high = row["gain"], before["gain"]
            share = (1 - low) / (high - low)
            return row["tokens"] * (before["tokens"] / row["tokens"]) ** share
        before = row
    return None if before is None else before["tokens"]


def render(result: dict[str, Any]) -> str:
    """A row for each length, and both crossovers."""
    rows = [
        [
            row["tokens"],
            *(row["milliseconds"][name]["median"] for name in row["milliseconds"]),
            row["gain"],
            row["predicted_gain"],
        ]
        for row in result["lengths"]
    ]
    names = result["lengths"][0]["milliseconds"]
    headers = ["tokens", *(f"{name} ms" for name in names), "gain", "predicted"]
    measured = result["crossover"]
    return "\n".join(
        [
            tabulate(rows, headers, floatfmt=("d", *[".2f"] * (len(headers) - 1))),
            f"measured to pay from {'no length' if measured is None else f'{measured:.0f} tokens'}"
            f" on, predicted from {result['predicted_crossover']}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--density", type=float, default=find_router(AUTO).density)
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each length is timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    shape = (args.heads, args.dim, args.density, device)
    rows = [measure_length(n, *shape, args.seconds) for n in sorted(args.tokens)]
    itemsize = 4 if device.type == "cpu" else 2
    options = Options(router=AUTO, density=args.density)
    result = {
        "heads": args.heads,
        "dim": args.dim,
        "density": args.density,
        "lengths": rows,
        "crossover": find_crossover(rows),
        "predicted_crossover": predict_attention(
            args.heads, args.dim, itemsize, device, options
        ).crossover,
        **describe_run(args.device),
    }
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
