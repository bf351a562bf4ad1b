"""One search of every router, as the router itself calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_opt.policy.cost import TOKENS
from dit_opt.routers import ROUTERS
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Goal, Router, SiteWriter


class _EagerEmitter:
    """Does what `program.emit.Emitter` would write, on real tensors, and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[functools.partial[Any]] = []

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(functools.partial(function, *args, **kwargs))
        return self.calls[-1]()

    def method(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, name)(*args, **kwargs)

    def unpack(self, results: tuple[Any, ...], count: int) -> list[Any]:
        return list(results[:count])

    def size(self, tensor: Tensor, dim: int) -> int:
        return tensor.shape[dim]


def list_searches(
    q: Tensor, k: Tensor, grid: tuple[int, int, int], density: float
) -> dict[str, Callable[[], Any]]:
    """By router: a call that searches a plan for q, k `[B, H, N, D]` whose tokens are all video.

    Left out are routers that search nothing, and those that score every pair.
    """
    found = {}
    for router in ROUTERS:
        if router.count_pairs(TOKENS) not in (0, TOKENS**2):
            found[router.name] = _record_search(router, q, k, grid, density)
    return found


def _record_search(
    router: Router, q: Tensor, k: Tensor, grid: tuple[int, int, int], density: float
) -> Callable[[], Any]:
    emit: Any = _EagerEmitter()
    nodes: dict[str, Any] = {"graph": None, "emit": emit, "q": q, "k": k, "v": k, "bias": None}
    site = SiteWriter(
        **nodes,
        place=0,
        anchor=None,
        scale=q.shape[-1] ** -0.5,
        goal=Goal(density, by_density=True),
        grid=(*grid, 0),
        video=q.shape[2],
        has_grid=False,
        ordered=False,
        guarded=False,
        boosted=False,
    )
    router.search(site)
    return next(c for c in emit.calls if len(c.args) > 1 and c.args[0] is q and c.args[1] is k)


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
