"""The operators part of the GPU benchmark: every op beside the processor's, before any timing.

Lists of the searches are what all else runs on, so a benchmark that made its plans by a wrong
kernel would not notice by its own results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dit_opt.backend  # noqa: F401 - registers the operators
from benchmarks.searches import list_searches
from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.kernels.norm_rope import norm_rope
from dit_opt.routers.base import BLOCK_K, BLOCK_Q

DTYPE = torch.bfloat16
DENSITY = 0.25
# The second has ragged blocks of queries and of keys.
GRIDS = ((4, 16, 16), (3, 15, 17))
# Blocks that rounding may move over a threshold, and what it may change of a recall.
AGREEMENT, RECALL = 0.97, 5e-3
# Of tensors that are moved or computed, in L2; what is only moved is equal.
ERROR = 1e-2


def make_inputs(grid: tuple[int, int, int], heads: int = 4, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Queries and keys `[1, H, N, D]` on the processor: neighbours look alike, as in a video, or
    no block would stand out."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, heads, grid[0] * grid[1] * grid[2], dim, generator=generator)
    walk = [x.cumsum(2) * 0.3 + x * 0.3 for x in (q, k)]
    q, k = (x / x.norm(dim=-1, keepdim=True) * dim**0.5 for x in walk)
    return (3 * q).to(DTYPE), k.to(DTYPE)


def list_checks() -> dict[str, Callable[[torch.device], dict[str, Any]]]:
    """By name: a call that compares an op on a device with the processor's."""
    checks: dict[str, Callable[[torch.device], dict[str, Any]]] = {}
    for grid in GRIDS:
        name = "x".join(map(str, grid))
        for search in list_searches(*make_inputs(grid), grid, DENSITY):
            checks[f"{search} {name}"] = lambda device, g=grid, s=search: check_search(s, g, device)
        checks[f"moves and packed lists {name}"] = lambda device, g=grid: check_moves(g, device)
    checks["norm and rotation"] = check_prologue
    return checks


def check_search(name: str, grid: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Which share of the blocks both keep or both leave out, and how far recalls are apart."""
    q, k = make_inputs(grid)
    # in float32, which keeps more of the scores than bfloat16 does on a processor
    expected = list_searches(q.float(), k.float(), grid, DENSITY)[name]()
    found = list_searches(q.to(device), k.to(device), grid, DENSITY)[name]()
    found = tuple(x.cpu() for x in found)
    if name == "rainfusion":
        # a choice for each head, what it keeps and its share
        same = (found[0] == expected[0]).float().mean().item()
        recalls = [(x, y) for x, y in zip(found[1:], expected[1:], strict=True)]
    else:
        blocks = -(-q.shape[2] // BLOCK_K)
        masks = [expand_lists(*plan[:2], blocks) for plan in (found, expected)]
        same = (masks[0] == masks[1]).float().mean().item()
        # counts, lists and, of headwise, an order stand before recall and density
        start = 3 if name == "headwise" else 2
        recalls = [(found[i], expected[i]) for i in (start, start + 1)]
        if name == "headwise":
            same = min(same, (found[2] == expected[2]).float().mean().item())
    apart = max((x.float() - y.float()).abs().max().item() for x, y in recalls)
    return {
        "agreement": same,
        "recall_apart": apart,
        "passed": same >= AGREEMENT and apart <= RECALL,
    }


def check_moves(grid: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Tokens in the order of each head and back, and a plan through its packed form."""
    ops = torch.ops.ditopt
    q, k = make_inputs(grid)
    tokens = q.shape[2]
    counts, indices, order = list_searches(q, k, grid, DENSITY)["headwise"]()[:3]

    def move(where: torch.device) -> tuple[Tensor, ...]:
        at = [x.to(where) for x in (q, order, counts, indices)]
        rows, inverse = ops.headwise_rows_v1(at[1], tokens, *grid, 0, BLOCK_Q, BLOCK_K)
        moved = ops.gather_tokens_v1(at[0], rows)
        words = ops.pack_plan_v1(at[2], at[3], tokens, BLOCK_K)
        unpacked = ops.unpack_plan_v1(words, tokens, BLOCK_K)
        back = ops.scatter_tokens_v1(moved, inverse)
        return tuple(x.cpu() for x in (rows, moved, back, words, *unpacked))

    found, expected = move(device), move(torch.device("cpu"))
    same = all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    return {"passed": same and torch.equal(found[2], q)}


def check_prologue(device: torch.device) -> dict[str, Any]:
    """The one kernel of norm and rotation, on heads of one norm each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 301, 4, 64, generator=generator).to(DTYPE)
    weight = (1 + 0.1 * torch.randn(64, generator=generator)).to(DTYPE)
    angles = torch.randn(301, 32, generator=generator).repeat_interleave(2, -1)

    def compute(where: torch.device) -> Tensor:
        tensors = [t.to(where) for t in (x, weight, angles.cos(), angles.sin())]
        return norm_rope(tensors[0], tensors[1], 1e-6, False, *tensors[2:]).cpu().float()

    found, expected = compute(device), compute(torch.device("cpu"))
    error = ((found - expected).norm() / expected.norm()).item()
    return {"relative_error": error, "passed": error <= ERROR}
