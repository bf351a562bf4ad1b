"""How many blocks each head and each row may keep: as many as its softmax mass needs.

The kept mass of a layer is a sum over blocks, so the lists that hold most of it at a given size are
those of one threshold on mass. Peaked rows pass few blocks over it and leave room for diffuse ones.
The flattest rows of all get the least from a sum, though; the sum of squares of what each row
drops, which is closer to an error of the output, spreads the loss evenly and is a threshold too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dit_opt.kernels.native import budgets as native
from dit_opt.kernels.routers.plan import BlockLayout, Plan, list_kept
from dit_opt.kernels.routers.thresholds import HEAVIEST, LIGHTEST, find_threshold

# Equal masses are told apart by up to this much, or a threshold would take all of them or none.
_TIE_WIDTH = 2.0**-10

# What scores are held to, so that none leaves the range of thresholds when ties are told apart.
_BOUNDS = (LIGHTEST, HEAVIEST / 2)

# Steps of a sequence that fills the plane evenly; ties then fall evenly over rows and columns.
_ROW_STEP, _COLUMN_STEP = 0.7548776662466927, 0.5698402909980532

# Rounding in the sum of all blocks must not drop one from a plan that may keep everything.
_ROUNDING = 1 + 1e-6

Spread = Literal["need", "even", "equal"]


def allot_blocks(
    mass: Tensor,
    *,
    blocks: BlockLayout,
    quality: float | None = None,
    density: float | None = None,
    spread: Spread = "need",
    floor: int = 2,
    capacity: int | None = None,
    boost: Tensor | None = None,
) -> Plan:
    """The smallest lists that keep a share `quality` of the mass, or the best of size `density`.

    Which lists are best, `spread` says: "need" keeps the most mass; "even" makes the mean square of
    what rows drop the least, for which it sorts each row; "equal" gives all rows of an item (of a
    head, under a quality) the same number of blocks, up to one, for measuring what the others win.

    Quality holds for each head: the mean over its rows, without those that are dense by rule,
    reaches the target, by one threshold on mass per head. Density holds for each item: the mean
    over the heads comes as close to the target as whole blocks can without exceeding it, by one
    threshold for all heads, and each row keeps its `floor` heaviest blocks. What is always kept
    counts, and is kept even where it alone exceeds the target. What a boost adds does not count:
    the mean exceeds the target by it, and the other heads keep what they would without.

    Args:
        mass: float32 [B, H, nq, nk], the share of each row's softmax mass in each key block.
        blocks: their sizes in real tokens, and which of them are always kept.
        capacity: entries per list; rows that need more keep their heaviest blocks. nk if None.
        boost: float32 [B, H], 1 or more: how much less each head may drop than others do. A
            quality q becomes 1 - (1 - q) / boost; under a density its blocks score so many times
            as much against the threshold of all heads. An infinite one keeps everything.

    Raises ValueError for an unknown spread and unless one of quality and density is in (0, 1].
    """
    _check_target(quality, density)
    scores = _score_blocks(mass, blocks)
    if spread == "even":
        scores = _square_losses(scores, blocks)
    elif spread == "equal":
        scores = _rank_blocks(scores)
    elif spread != "need":
        raise ValueError(f'The spread is {spread!r}; it is one of "need", "even" and "equal".')
    if quality is not None:
        gains = mass * _weigh_rows(blocks)[:, None]
        share = quality if boost is None else 1 - (1 - quality) / boost[..., None, None]
        target = share * gains.sum((-2, -1), keepdim=True)
        threshold = find_threshold(scores, gains, target, (-2, -1))
    else:
        if spread != "equal" and floor > 0:
            heaviest = mass.topk(min(floor, mass.shape[-1])).indices
            scores = scores.scatter(-1, heaviest, torch.inf)
        areas = _share_areas(blocks)
        target = density * mass.shape[1] * _ROUNDING
        threshold = find_threshold(scores, areas, target, (-3, -2, -1), within=True)
        if boost is not None:
            # after the threshold, or a favoured head would take the others' budget
            scores = scores * boost[..., None, None]
    kept = scores >= threshold
    if boost is not None:
        # rounding may leave a little of what is to be kept whole
        kept = kept | (boost == torch.inf)[..., None, None]
    return list_blocks(kept, mass, blocks=blocks, capacity=capacity)


def rate_recall(mass: Tensor, density: float, blocks: BlockLayout) -> Tensor:
    """What the heaviest blocks of `density` keep of mass [..., nq, nk], float32 [...].

    Each matrix has a budget of its own, in whole blocks. For comparing: no list is made.

    Raises ValueError unless the density is in (0, 1].
    """
    _check_target(None, density)
    scores = _score_blocks(mass, blocks)
    count = max(1, round(density * blocks.always_kept.numel()))
    found = native.rate_recall(scores, mass, _weigh_rows(blocks), count)
    if found is not None:
        return found
    heaviest = scores.flatten(-2).topk(count, sorted=False).indices
    shares = (mass * _weigh_rows(blocks)[:, None]).flatten(-2)
    return shares.gather(-1, heaviest).sum(-1)


def list_blocks(
    kept: Tensor,
    mass: Tensor,
    *,
    blocks: BlockLayout,
    capacity: int | None = None,
) -> Plan:
    """The plan that keeps some blocks, bool [B, H, nq, nk], of the given mass; see allot_blocks."""
    kept = kept | blocks.always_kept
    if capacity is not None and capacity < mass.shape[-1]:
        scores = _score_blocks(mass, blocks)
        kept = kept & (scores >= find_threshold(scores, kept.float(), capacity, (-1,), within=True))
    counts, indices = list_kept(kept, capacity)
    return Plan(counts, indices, *_measure_kept(kept, mass, blocks))


def _measure_kept(kept: Tensor, mass: Tensor, blocks: BlockLayout) -> tuple[Tensor, Tensor]:
    """The recall and the density of what is kept, float32 [B, H] each."""
    weights, areas = _weigh_rows(blocks), _share_areas(blocks)
    found = native.measure_kept(kept, mass, weights, areas)
    if found is not None:
        return found
    mass = mass * weights[:, None]
    total = mass.sum((-2, -1))
    share = torch.where(kept, mass, 0.0).sum((-2, -1)) / total
    density = torch.where(kept, areas, 0.0).sum((-2, -1))
    # A head without any key, or without any row that is not dense, loses nothing.
    return torch.where(total > 0, share, 1.0), density


def _check_target(quality: float | None, density: float | None) -> None:
    if (quality is None) == (density is None):
        raise ValueError(
            f"quality is {quality} and density is {density}; give one of them, and not the other."
        )
    name, target = ("density", density) if quality is None else ("quality", quality)
    if not 0 < target <= 1:
        raise ValueError(f"The target {name} is {target}; it must lie in (0, 1].")


def _keep_on_processors(build: Callable[[BlockLayout], Tensor]) -> Callable[[BlockLayout], Tensor]:
    """Makes a table of a layout once. A GPU makes it each time: one that is made inside of a CUDA
    graph lies in the memory of that."""
    kept = functools.lru_cache(maxsize=8)(build)

    @functools.wraps(build)
    def get(blocks: BlockLayout) -> Tensor:
        return (kept if blocks.key_sizes.device.type == "cpu" else build)(blocks)

    return get


@_keep_on_processors
def _weigh_rows(blocks: BlockLayout) -> Tensor:
    """What each query block counts in the mean over rows, [nq]: nothing if it is dense by rule."""
    sizes = blocks.query_sizes
    return torch.where(blocks.always_kept.all(-1), 0.0, sizes) / sizes.sum()


@_keep_on_processors
def _share_areas(blocks: BlockLayout) -> Tensor:
    """The share of each block in the score matrix, [nq, nk]."""
    rows, columns = (size / size.sum() for size in (blocks.query_sizes, blocks.key_sizes))
    return rows[:, None] * columns


@_keep_on_processors
def _weigh_keys(blocks: BlockLayout) -> Tensor:
    """What makes mass in a block mass per key token, in units of the longest block, [nk]."""
    return blocks.key_sizes.amax() / blocks.key_sizes


@_keep_on_processors
def _spread_ties(blocks: BlockLayout) -> Tensor:
    """What tells equal scores apart in an even pattern, infinite if forced, [nq, nk]."""
    like = {"dtype": torch.float32, "device": blocks.key_sizes.device}
    row, column = (torch.arange(n, **like) for n in blocks.always_kept.shape)
    tie = (row[:, None] * _ROW_STEP + column * _COLUMN_STEP) % 1
    return (1 + _TIE_WIDTH * tie).masked_fill(blocks.always_kept, torch.inf)


def _score_blocks(mass: Tensor, blocks: BlockLayout) -> Tensor:
    """Mass per key token, all different and within the range of thresholds; infinite if forced."""
    per_token, ties = _weigh_keys(blocks), _spread_ties(blocks)
    found = native.score_blocks(mass, per_token, ties, *_BOUNDS)
    if found is not None:
        return found
    return (mass * per_token).clamp(*_BOUNDS) * ties


def _square_losses(scores: Tensor, blocks: BlockLayout) -> Tensor:
    """By how much each block lowers the square of what its row drops, heavier ones being kept."""
    ties = _spread_ties(blocks)
    found = native.square_losses(scores, ties, *_BOUNDS)
    if found is not None:
        return found
    values = scores.masked_fill(scores == torch.inf, 0.0)
    ordered, places = values.sort(dim=-1, descending=True, stable=True)
    dropped = ordered.flip(-1).cumsum(-1).flip(-1)
    # D^2 - (D - m)^2 falls along a row, so a threshold keeps the heaviest blocks of each.
    losses = ordered * (2 * dropped - ordered)
    losses = torch.empty_like(losses).scatter_(-1, places, losses)
    return losses.clamp(*_BOUNDS) * ties


def _rank_blocks(scores: Tensor) -> Tensor:
    """Scores by the place in the row alone, so that a threshold keeps as many in each row."""
    places = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    heads, rows, columns = scores.shape[-3:]
    number = torch.arange(heads * rows, device=scores.device).view(heads, rows, 1)
    # Rows of one place pass the threshold one after the other, evenly over rows and heads.
    ranks = 1 - (places + number * _ROW_STEP % 1) / (columns + 1)
    return torch.where(scores == torch.inf, torch.inf, ranks)
