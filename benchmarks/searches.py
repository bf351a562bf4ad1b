"""One search of every router, as the passes ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dit_opt.backend  # noqa: F401 - registers the operators
from dit_opt.routers.adaspa import ROW_STEP
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, SPREAD
from dit_opt.routers.headwise import Headwise
from dit_opt.routers.subblock import CELL


def list_searches(
    q: Tensor, k: Tensor, grid: tuple[int, int, int], density: float
) -> dict[str, Callable[[], Any]]:
    """By router: a call that searches a plan for q, k `[B, H, N, D]` whose tokens are all video."""
    ops, tokens = torch.ops.ditopt, q.shape[2]
    goal = (q.shape[-1] ** -0.5, density)
    place, where = (0, tokens, BLOCK_Q, BLOCK_K), (*grid, 0, BLOCK_Q, BLOCK_K)
    return {
        "headwise": lambda: ops.headwise_plan_v1(
            q, k, None, *goal, True, *where, Headwise.cell, SPREAD
        ),
        "adaspa": lambda: ops.adaspa_plan_v1(
            q, k, None, None, *goal, True, *place, ROW_STEP, SPREAD
        ),
        "subblock": lambda: ops.subblock_plan_v1(q, k, None, *goal, True, *place, CELL, SPREAD),
        "sol": lambda: ops.sol_plan_v1(q, k, None, *goal, "density", *place, SPREAD),
        "rainfusion": lambda: ops.rainfusion_recognize_v1(q, k, None, *goal, True, *where),
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
