"""What budgets by need, the tail and the searches are worth, on the attention of the demo model.

    python -m benchmarks.adaptive [--density 0.25] [--checkpoint F] [--seconds 5] [--json F]

Queries, keys and values of every self-attention call are taken from dense forwards of noised clips,
each head in the order that the default router picks for it. Recall is exact, per row of blocks, and
also measured with all heads in one order; errors are of the output against dense attention; a
search is timed in turns with dense attention over the same tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from benchmarks.attention_mass import TOKENS, Call, record_noised
from benchmarks.searches import list_searches, make_mover
from benchmarks.timing import time_in_turns
from dit_opt.demo import clips
from dit_opt.demo.machine import describe_run
from dit_opt.demo.model import CHECKPOINT, GRID, load_model
from dit_opt.kernels.block_sparse_attention.op import block_sparse_attention
from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.kernels.plan.budgets import Spread, allot_blocks
from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.plan.plan import lay_blocks
from dit_opt.kernels.searches.headwise import head_orders
from dit_opt.kernels.searches.mass.blocks import measure_block_mass
from dit_opt.kernels.token_order import gather_tokens
from dit_opt.options import DEFAULT_REFRESH_EVERY
from dit_opt.routers import AUTO, find_router
from dit_opt.routers.base import BLOCK_K, BLOCK_Q
from dit_opt.routers.headwise import Headwise

SPREADS: tuple[Spread, ...] = ("equal", "need", "even")
# a trajectory, and how often searches come, for the share of the searches in it
STEPS, DENSE_STEPS = 50, 0
REFRESH = (1, 2, 5, DEFAULT_REFRESH_EVERY)


def order_tokens(call: Call, density: float, name: str | None = None) -> Call:
    """A call whose tokens are in the order of that name, or in the one that suits each head."""
    q, k, v = call.q, call.k, call.v
    layout = VideoLayout(*GRID, 0, TOKENS)
    orders = head_orders.build_orders(layout, BLOCK_Q, BLOCK_K, Headwise.cell, q.device)
    if name is None:
        order = list_searches(q, k, GRID, density)[AUTO]()[2]
    else:
        order = torch.full(q.shape[:2], head_orders.ORDER_NAMES.index(name))
    return Call(call.layer, *(gather_tokens(x, orders.orders[order.long()]) for x in (q, k, v)))


def record_calls(model: torch.nn.Module) -> list[Call]:
    """The calls of one clip of two subjects, their tokens in the model's own order."""
    rng = torch.Generator().manual_seed(0)
    prompt = clips.list_prompts(1)[0]
    return record_noised(model, clips.render(prompt, rng)[None], [prompt], rng)


def measure_recalls(calls: list[Call], density: float) -> dict[str, dict[str, float]]:
    """Exact recall of rows of blocks under budgets of one mean density, by spread."""
    recalls: dict[str, list[torch.Tensor]] = {spread: [] for spread in SPREADS}
    blocks = lay_blocks(TOKENS, 0, TOKENS, BLOCK_Q, BLOCK_K, torch.device("cpu"))
    for call in calls:
        mass = _measure_mass(call)
        for spread in SPREADS:
            plan = allot_blocks(mass, blocks, density, True, spread=spread)
            kept = expand_lists(plan.counts, plan.indices, mass.shape[-1])
            recalls[spread].append((mass * kept).sum(-1).flatten())
    return {
        spread: {
            "mean": torch.cat(found).mean().item(),
            "5th_percentile": torch.cat(found).quantile(0.05).item(),
            "least": torch.cat(found).min().item(),
        }
        for spread, found in recalls.items()
    }


def measure_tails(calls: list[Call], density: float) -> list[dict[str, Any]]:
    """Relative error of the output of each layer with the best plan, by tail, mean over levels."""
    blocks = lay_blocks(TOKENS, 0, TOKENS, BLOCK_Q, BLOCK_K, torch.device("cpu"))
    found: dict[int, dict[str, list[float]]] = {}
    for call in calls:
        plan = allot_blocks(_measure_mass(call), blocks, density, True)
        dense = F.scaled_dot_product_attention(call.q, call.k, call.v)
        row = found.setdefault(call.layer, {"drop": [], "centroid": []})
        for tail in row:
            out, _ = block_sparse_attention(
                call.q, call.k, call.v, plan.counts, plan.indices,
                block_q=BLOCK_Q, block_k=BLOCK_K, tail=tail,
            )  # fmt: skip
            row[tail].append(float((out - dense).norm() / dense.norm()))
    return [
        {"layer": layer, **{tail: statistics.fmean(errors) for tail, errors in row.items()}}
        for layer, row in sorted(found.items())
    ]


def measure_searches(call: Call, density: float, seconds: float) -> dict[str, Any]:
    """Time of one search as a share of dense attention, and of attention over a trajectory.

    In a trajectory of `STEPS` steps the first `DENSE_STEPS` are dense; the others pay for sparse
    attention at `density`, every few of them for a search and for packing its lists, and those
    between for unpacking them; `rainfusion` keeps a choice for each head, which is no list. Shares
    are of all attention, these included. "order" is what every step of `headwise` pays beside the
    attention op, to move tokens into the order of each head and back; it is in no other figure.
    """
    q, k, v, scale = call.q, call.k, call.v, call.q.shape[-1] ** -0.5
    rivals: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v)
    }
    rivals |= list_searches(q, k, GRID, density)
    plan = rivals["subblock"]()
    rivals["sparse"] = lambda: torch.ops.ditopt.block_sparse_attention_v3(
        q, k, v, *plan[:2], None, scale, BLOCK_Q, BLOCK_K
    )
    rivals["order"] = make_mover(q, k, v, GRID, rivals["headwise"]()[2])
    rivals["pack"] = lambda: torch.ops.ditopt.pack_plan_v1(*plan[:2], TOKENS, BLOCK_K)
    words = rivals["pack"]()
    rivals["unpack"] = lambda: torch.ops.ditopt.unpack_plan_v1(words, TOKENS, BLOCK_K)
    times = time_in_turns(rivals, seconds, q.device)
    medians = {name: t.median for name, t in times.items()}
    dense, sparse, order = (medians.pop(name) for name in ("dense", "sparse", "order"))
    kept = {name: medians.pop(name) for name in ("pack", "unpack")}
    attention = DENSE_STEPS * dense + (STEPS - DENSE_STEPS) * sparse
    spent = {
        name: {
            every: _spend(search, every, {} if name == "rainfusion" else kept) for every in REFRESH
        }
        for name, search in medians.items()
    }
    return {
        "milliseconds": {name: dataclasses.asdict(t) for name, t in times.items()},
        "order_share_of_sparse": order / sparse,
        "share_of_dense": {name: search / dense for name, search in medians.items()},
        "share_of_trajectory": {
            name: {every: time / (attention + time) for every, time in row.items()}
            for name, row in spent.items()
        },
    }


def _spend(search: float, every: int, kept: dict[str, float]) -> float:
    """Of a trajectory: searches, and keeping their lists for the steps until the next."""
    sparse = STEPS - DENSE_STEPS
    searches = sparse / every
    if every == 1 or not kept:
        return searches * search
    return searches * (search + kept["pack"]) + (sparse - searches) * kept["unpack"]


def _measure_mass(call: Call) -> torch.Tensor:
    return measure_block_mass(call.q, call.k, call.q.shape[-1] ** -0.5, BLOCK_Q, BLOCK_K)


def render(result: dict[str, Any]) -> str:
    """Four tables."""
    recalls = [[name, *row.values()] for name, row in result["recall"].items()]
    tails = [[f"layer {r['layer']}", r["drop"], r["centroid"]] for r in result["tail"]]
    searches = [
        [name, result["search"]["share_of_dense"][name], *row.values()]
        for name, row in result["search"]["share_of_trajectory"].items()
    ]
    spreads = list(result["recall"])
    by_order = [
        [name, *(row[spread]["5th_percentile"] for spread in spreads)]
        for name, row in result["recall_in_one_order"].items()
    ]
    return "\n\n".join(
        [
            f"recall of rows at density {result['density']}",
            tabulate(recalls, ["budgets", "mean", "5th percentile", "least"], floatfmt=".3f"),
            "5th percentile of it by budgets, all heads in one order",
            tabulate(by_order, ["", *spreads], floatfmt=".3f"),
            "relative error of the output, exact search",
            tabulate(tails, ["", "drop", "centroid"], floatfmt=".4f"),
            "searches: share of a dense call; with their lists kept for ... steps, share of all "
            f"attention in {STEPS} steps",
            tabulate(searches, ["", "one", *map(str, REFRESH)], floatfmt=".3%"),
            "moving tokens into the order of each head and back, beside each sparse call: "
            f"{result['search']['order_share_of_sparse']:.1%} of it",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--density", type=float, default=find_router(AUTO).density)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long searches are timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recorded = record_calls(load_model(args.checkpoint))
    calls = [order_tokens(call, args.density) for call in recorded]
    result = {
        "density": args.density,
        "recall": measure_recalls(calls, args.density),
        "recall_in_one_order": {
            name: measure_recalls(
                [order_tokens(call, args.density, name) for call in recorded], args.density
            )
            for name in head_orders.ORDER_NAMES
        },
        "tail": measure_tails(calls, args.density),
        "search": measure_searches(calls[0], args.density, args.seconds),
        **describe_run(),
    }
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
