"""Scores of blocks and sums over kept blocks by C++ kernels.

Every function returns None where the library is missing, or for tensors that are not float32 on the
CPU; the caller then uses torch.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_opt.kernels.cpp.arguments import count, point
from dit_opt.kernels.cpp.build import load_library


def _find_library(*values: Tensor) -> ctypes.CDLL | None:
    """The library, if it is there and takes such tensors."""
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in values):
        return None
    return load_library()


def score_blocks(
    mass: Tensor, per_token: Tensor, ties: Tensor, lightest: float, heaviest: float
) -> Tensor | None:
    """Mass `[..., nq, nk]` times `per_token` `[nk]`, clamped, times `ties` `[nq, nk]`; float32."""
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
    """How much keeping a block lowers its row's squared dropped mass, all heavier ones kept.

    Of scores `[..., nq, nk]`, where infinite ones count as 0; clamped, then times `ties`
    `[nq, nk]`; float32.
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
    """The mass of each matrix `[..., nq, nk]` in its `kept` blocks of the highest scores, float32
    `[...]`, with rows weighted by `weights` `[nq]`. Scores have the shape of the mass.
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

    `kept`: bool `[..., nq, nk]`. Rows are weighted by `weights` `[nq]`; the share of no mass is 1.
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
