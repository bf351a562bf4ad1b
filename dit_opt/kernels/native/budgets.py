"""Which blocks a plan keeps, and what they hold, by the C++ kernels.

Everything returns None where these are not there, or for what is not float32 on the processor.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_opt.kernels.cpp.arguments import count, point
from dit_opt.kernels.cpp.build import load_library


def _find_library(*values: Tensor) -> ctypes.CDLL | None:
    """The kernels, where they are there and take such tensors."""
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in values):
        return None
    return load_library()


def score_blocks(
    mass: Tensor, per_token: Tensor, ties: Tensor, lightest: float, heaviest: float
) -> Tensor | None:
    """Mass `[..., nq, nk]` times `per_token` `[nk]`, bounded, times `ties` `[nq, nk]`; float32."""
    library = _find_library(mass, per_token, ties)
    if library is None:
        return None
    mass, per_token, ties = (x.contiguous() for x in (mass, per_token, ties))
    scores = mass.new_empty(mass.shape)
    library.ditopt_score_blocks(
        *map(point, (mass, per_token, ties, scores)),
        *count(mass.numel() // ties.numel(), *ties.shape),
        *map(ctypes.c_float, (lightest, heaviest)),
    )
    return scores


def square_losses(scores: Tensor, ties: Tensor, lightest: float, heaviest: float) -> Tensor | None:
    """By how much each block lowers the square of what its row drops, heavier ones being kept.

    Of scores `[..., nq, nk]`, infinite ones counting nothing; bounded, and times `ties` `[nq, nk]`;
    float32.
    """
    library = _find_library(scores, ties)
    if library is None:
        return None
    scores, ties = scores.contiguous(), ties.contiguous()
    losses = scores.new_empty(scores.shape)
    rows, columns = ties.shape
    library.ditopt_square_losses(
        *map(point, (scores, ties, losses)),
        *count(scores.numel() // columns, columns, rows),
        *map(ctypes.c_float, (lightest, heaviest)),
        *count(torch.get_num_threads()),
    )
    return losses


def rate_recall(scores: Tensor, mass: Tensor, weights: Tensor, kept: int) -> Tensor | None:
    """The mass of each matrix `[..., nq, nk]` in its `kept` blocks with the highest scores, float32
    `[...]`, rows counting by `weights` `[nq]`. All float32; scores in the shape of the mass.
    """
    library = _find_library(scores, mass, weights)
    if library is None:
        return None
    scores, mass, weights = (x.contiguous() for x in (scores, mass, weights))
    recall = mass.new_empty(mass.shape[:-2])
    library.ditopt_rate_recall(
        *map(point, (scores, mass, weights, recall)),
        *count(recall.numel(), *mass.shape[-2:], kept, torch.get_num_threads()),
    )
    return recall


def measure_kept(
    kept: Tensor, mass: Tensor, weights: Tensor, areas: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The share of mass `[..., nq, nk]` that is kept, and the sum of the kept `areas` `[nq, nk]`.

    `kept`: bool `[..., nq, nk]`. Rows count by `weights` `[nq]`; without any mass, the share is 1.
    """
    library = _find_library(mass, weights, areas)
    if library is None:
        return None
    kept, mass, weights, areas = (x.contiguous() for x in (kept, mass, weights, areas))
    recall, density = (mass.new_empty(mass.shape[:-2]) for _ in range(2))
    library.ditopt_measure_kept(
        *map(point, (kept, mass, weights, areas, recall, density)),
        *count(recall.numel(), *areas.shape),
    )
    return recall, density
