"""How many blocks each head and each row may keep: as many as its softmax mass needs.

The kept mass of a layer is a sum over blocks, so one threshold on mass gives the lists that keep
the most at a given size: peaked rows have few blocks above it and leave room for diffuse rows. That
sum starves the flattest rows, though. The sum over rows of the squared dropped mass is closer to
the error of the output; it spreads the loss evenly, and its minimum is a threshold, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dit_opt.kernels.plan.impl.cpp import budgets as cpp
from dit_opt.kernels.plan.plan import BlockLayout, Plan, list_kept
from dit_opt.kernels.plan.thresholds import HEAVIEST, LIGHTEST, find_threshold

# Blocks that each row keeps under a density, whatever they hold.
FLOOR = 2

# Ties are broken by factors of up to 1 + this, or a threshold would keep all of them or none.
_TIE_WIDTH = 2.0**-10

# Scores are clamped to these, so that tie-breaking keeps them in the range of thresholds.
_BOUNDS = (LIGHTEST, HEAVIEST / 2)

# Steps of a two-dimensional low-discrepancy sequence, which breaks ties evenly over rows and
# columns.
_ROW_STEP, _COLUMN_STEP = 0.7548776662466927, 0.5698402909980532

# Rounding in the sum of all areas must not drop a block from a plan that may keep everything.
_ROUNDING = 1 + 1e-6

Spread = Literal["need", "even", "equal"]


def allot_blocks(
    mass: Tensor,
    blocks: BlockLayout,
    target: float,
    by_density: bool,
    *,
    spread: Spread = "even",
    boost: Tensor | None = None,
) -> Plan:
    """The smallest lists that keep a share `target` of the mass, or the best ones of a density.

    `spread` says which lists are best: "even" minimises the mean square of what rows drop (each row
    is sorted for it), "need" maximises the kept mass, and "equal" gives all rows of an item (under
    a quality: of a head) the same number of blocks, up to one; it is the baseline of the others.

    A quality holds for each head: the mean over its rows, without those that are dense by rule,
    reaches the target, by one threshold on mass per head. A density holds for each item: the mean
    over its heads is as close to the target as whole blocks allow without exceeding it, by one
    threshold for all heads, and each row keeps its `FLOOR` heaviest blocks. Blocks that are always
    kept count, and are kept even where they alone exceed the target. What a boost adds does not
    count: it raises the mean above the target, and the other heads keep what they had without it.

    Args:
        mass: float32 [B, H, nq, nk], the share of each row's softmax mass in each key block.
        target, by_density: a density in (0, 1], or else a quality.
        boost: float32 [B, H], 1 or more: how many times less each head may drop. A quality q
            becomes 1 - (1 - q) / boost; under a density the scores of the head are multiplied by it
            before they are compared with the threshold. An infinite one keeps everything.

    Raises ValueError for an unknown spread or a target outside (0, 1].
    """
    _check_target("density" if by_density else "quality", target)
    scores = _score_blocks(mass, blocks)
    if spread == "even":
        scores = _square_losses(scores, blocks)
    elif spread == "equal":
        scores = _rank_blocks(scores)
    elif spread != "need":
        raise ValueError(f'The spread is {spread!r}; it is one of "need", "even" and "equal".')
    if by_density:
        if spread != "equal" and FLOOR > 0:
            heaviest = mass.topk(min(FLOOR, mass.shape[-1])).indices
            scores = scores.scatter(-1, heaviest, torch.inf)
        areas = _share_areas(blocks)
        budget = target * mass.shape[1] * _ROUNDING
        threshold = find_threshold(scores, areas, budget, (-3, -2, -1), within=True)
        if boost is not None:
            # after the threshold, or a boosted head would take the others' budget
            scores = scores * boost[..., None, None]
    else:
        gains = mass * _weigh_rows(blocks)[:, None]
        share = target if boost is None else 1 - (1 - target) / boost[..., None, None]
        wanted = share * gains.sum((-2, -1), keepdim=True)
        threshold = find_threshold(scores, gains, wanted, (-2, -1))
    kept = (scores >= threshold) | blocks.always_kept
    if boost is not None:
        # rounding may drop a little of a head that is to be kept whole
        kept = kept | (boost == torch.inf)[..., None, None]
    return Plan(*list_kept(kept), *_measure_kept(kept, mass, blocks))


def rate_recall(mass: Tensor, density: float, blocks: BlockLayout) -> Tensor:
    """The mass that the heaviest blocks of a density keep, of mass [..., nq, nk]: float32 [...].

    Each matrix has a budget of its own, in whole blocks. It ranks alternatives without making a
    list. Raises ValueError unless the density is in (0, 1].
    """
    _check_target("density", density)
    scores = _score_blocks(mass, blocks)
    count = max(1, round(density * blocks.always_kept.numel()))
    found = cpp.rate_recall(scores, mass, _weigh_rows(blocks), count)
    if found is not None:
        return found
    heaviest = scores.flatten(-2).topk(count, sorted=False).indices
    shares = (mass * _weigh_rows(blocks)[:, None]).flatten(-2)
    return shares.gather(-1, heaviest).sum(-1)


def _measure_kept(kept: Tensor, mass: Tensor, blocks: BlockLayout) -> tuple[Tensor, Tensor]:
    """The recall and the density of what is kept, float32 [B, H] each."""
    weights, areas = _weigh_rows(blocks), _share_areas(blocks)
    found = cpp.measure_kept(kept, mass, weights, areas)
    if found is not None:
        return found
    mass = mass * weights[:, None]
    total = mass.sum((-2, -1))
    share = torch.where(kept, mass, 0.0).sum((-2, -1)) / total
    density = torch.where(kept, areas, 0.0).sum((-2, -1))
    # A head without any key, or without any row that is not dense, loses nothing.
    return torch.where(total > 0, share, 1.0), density


def _check_target(name: str, target: float) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"The target {name} is {target}; it must lie in (0, 1].")


def _cache_on_cpu(build: Callable[[BlockLayout], Tensor]) -> Callable[[BlockLayout], Tensor]:
    """Cache a table of a layout, on CPUs only: a tensor that is made while a CUDA graph is captured
    lies in the memory pool of that graph."""
    kept = functools.lru_cache(maxsize=8)(build)

    @functools.wraps(build)
    def get(blocks: BlockLayout) -> Tensor:
        return (kept if blocks.key_sizes.device.type == "cpu" else build)(blocks)

    return get


@_cache_on_cpu
def _weigh_rows(blocks: BlockLayout) -> Tensor:
    """The weight of each query block in the mean over rows, [nq]; 0 if it is dense by rule."""
    sizes = blocks.query_sizes
    return torch.where(blocks.always_kept.all(-1), 0.0, sizes) / sizes.sum()


@_cache_on_cpu
def _share_areas(blocks: BlockLayout) -> Tensor:
    """The share of the score matrix that each block covers, [nq, nk]."""
    rows, columns = (size / size.sum() for size in (blocks.query_sizes, blocks.key_sizes))
    return rows[:, None] * columns


@_cache_on_cpu
def _weigh_keys(blocks: BlockLayout) -> Tensor:
    """Factors that turn block mass into mass per key token, in units of a full block, [nk]."""
    return blocks.key_sizes.amax() / blocks.key_sizes


@_cache_on_cpu
def _spread_ties(blocks: BlockLayout) -> Tensor:
    """Factors that break ties in an even pattern, infinite for always kept blocks, [nq, nk]."""
    like = {"dtype": torch.float32, "device": blocks.key_sizes.device}
    row, column = (torch.arange(n, **like) for n in blocks.always_kept.shape)
    tie = (row[:, None] * _ROW_STEP + column * _COLUMN_STEP) % 1
    return (1 + _TIE_WIDTH * tie).masked_fill(blocks.always_kept, torch.inf)


def _score_blocks(mass: Tensor, blocks: BlockLayout) -> Tensor:
    """Mass per key token, clamped, with ties broken; infinite for always kept blocks."""
    per_token, ties = _weigh_keys(blocks), _spread_ties(blocks)
    found = cpp.score_blocks(mass, per_token, ties, *_BOUNDS)
    if found is not None:
        return found
    return (mass * per_token).clamp(*_BOUNDS) * ties


def _square_losses(scores: Tensor, blocks: BlockLayout) -> Tensor:
    """How much keeping a block lowers its row's squared dropped mass, all heavier ones kept."""
    ties = _spread_ties(blocks)
    found = cpp.square_losses(scores, ties, *_BOUNDS)
    if found is not None:
        return found
    values = scores.masked_fill(scores == torch.inf, 0.0)
    ordered, columns = values.sort(dim=-1, descending=True, stable=True)
    dropped = ordered.flip(-1).cumsum(-1).flip(-1)
    # D^2 - (D - m)^2 decreases along a sorted row, so a threshold keeps the heaviest of each row.
    losses = ordered * (2 * dropped - ordered)
    losses = torch.empty_like(losses).scatter_(-1, columns, losses)
    return losses.clamp(*_BOUNDS) * ties


def _rank_blocks(scores: Tensor) -> Tensor:
    """Scores by rank in the row alone, so that a threshold keeps equally many in each row."""
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    heads, rows, columns = scores.shape[-3:]
    number = torch.arange(heads * rows, device=scores.device).view(heads, rows, 1)
    # Blocks of one rank pass the threshold one after the other, evenly over rows and heads.
    scored = 1 - (ranks + number * _ROW_STEP % 1) / (columns + 1)
    return torch.where(scores == torch.inf, torch.inf, scored)
