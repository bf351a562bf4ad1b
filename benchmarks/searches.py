"""One search of every router, as the passes ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dit_opt.backend  # noqa: F401 - registers the operators
from dit_opt.passes.plan_nodes import CELL, HEADWISE_CELL, ROW_STEP
from dit_opt.passes.sparse_site import BLOCK_K, BLOCK_Q


def list_searches(
    q: Tensor, k: Tensor, grid: tuple[int, int, int], density: float
) -> dict[str, Callable[[], Any]]:
    """By router: a call that searches a plan for q, k `[B, H, N, D]` whose tokens are all video."""
    ops, tokens = torch.ops.ditopt, q.shape[2]
    goal = (None, q.shape[-1] ** -0.5, density, True)
    place, where = (0, tokens, BLOCK_Q, BLOCK_K), (*grid, 0, BLOCK_Q, BLOCK_K)
    return {
        "headwise": lambda: ops.headwise_plan_v2(q, k, *goal, *where, HEADWISE_CELL),
        "adaspa": lambda: ops.adaspa_plan_v2(q, k, *goal, *place, ROW_STEP),
        "subblock": lambda: ops.subblock_plan_v2(q, k, *goal, *place, CELL, CELL),
        "sol": lambda: ops.subblock_plan_v2(q, k, *goal, *place, BLOCK_Q, BLOCK_K),
        "rainfusion": lambda: ops.rainfusion_recognize_v1(q, k, *goal, *where),
    }


def make_mover(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], order: Tensor
) -> Callable[[], None]:
    """What `headwise` adds to every step: tokens into the order of each head, and back."""
    ops = torch.ops.ditopt

    def move() -> None:
        rows, inverse = ops.headwise_rows_v1(order, q.shape[2], *grid, 0, BLOCK_Q, BLOCK_K)
        for x in (q, k, v):
            ops.gather_tokens_v1(x, rows)
        ops.scatter_tokens_v1(q, inverse)

    return move
