"""RainFusion's router: each head gets the sparsest pattern that keeps its softmax mass.

Heads differ (local in space, local in time, or a texture over the frame) and change with the
prompt, so the choice is made per head in every forward, from a few exact softmax rows, and stays a
tensor on the device. Source: the Adaptive Recognition Module of RainFusion, arXiv 2505.21036; here
the recall is of the executed block lists, in their own token order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_opt.kernels.routers.patterns import HeadKind
from dit_opt.kernels.routers.sample import count_rows, draw_sample
from dit_opt.kernels.routers.sampled_mass import measure_sampled_mass
from dit_opt.kernels.routers.tables import Tables, build_tables

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "rainfusion_recognize_v1(Tensor q, Tensor k, Tensor? key_bias, float scale, float target, "
    "bool by_density, SymInt T, SymInt H, SymInt W, SymInt video_start, int block_q, int block_k, "
    "Tensor? boost=None) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "rainfusion_plan_v1(Tensor choice, SymInt N, SymInt T, SymInt H, SymInt W, "
    "SymInt video_start, int block_q, int block_k) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def measure_recall(
    q: Tensor,
    k: Tensor,
    tables: Tables,
    scale: float,
    key_bias: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """The softmax mass that each candidate's block lists hold for sampled queries, [B, H, C, m].

    By a float32 softmax over all keys, of scores in the dtype of the keys; a row without any key
    counts as fully kept. q [B, H, N, D] and k [B, Hk, N, D] may have any strides, Hk divides H;
    key_bias is additive, [B or 1, H or 1, N]; `rows` overrides m. Raises ValueError for shapes that
    do not fit.
    """
    batch, heads = q.shape[:2]
    _check_shapes(q, k, tables)
    sample = draw_sample(tables, count_rows(tables.layout) if rows is None else rows)
    count, blocks = sample.rows.numel(), sample.kept.shape[-1]
    by_row = q.new_empty(
        (count, blocks, batch, k.shape[1], heads // k.shape[1]), dtype=torch.float32
    )
    for part in measure_sampled_mass(q, k, sample.rows, tables.sums, scale, key_bias):
        by_row[part.rows, :, part.item, part.keys, part.group] = part.mass.permute(3, 1, 0, 2)
    by_row = by_row.flatten(2)
    kept = torch.bmm(sample.kept, by_row).unflatten(2, (batch, heads)).permute(2, 3, 1, 0)
    # The dense candidate stands last and keeps everything.
    total = kept[:, :, -1:]
    return torch.where(total > 0, kept / total, 1.0)


def recognize(
    q: Tensor,
    k: Tensor,
    tables: Tables,
    scale: float,
    target: float,
    by: Literal["quality", "density"] = "quality",
    key_bias: Tensor | None = None,
    rows: int | None = None,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The candidate of each head, int32 [B, H], and the mean recall of all, float32 [B, H, C].

    By quality: the sparsest candidate whose mean recall, less one standard error of that mean,
    reaches `target`. The margin pays for having picked the sparsest of several noisy estimates, and
    asks more of a head whose rows disagree. Dense always serves. By density: the best mean recall
    among the candidates of density <= `target`; the sparsest candidate where none is. Arguments as
    in `measure_recall`; `boost`, float32 [B, H], 1 or more: a head may drop 1 / boost of what the
    quality leaves it, or be boost times as dense; at infinity it is dense. Raises ValueError for a
    target outside (0, 1].
    """
    if not 0 < target <= 1:
        raise ValueError(f"The target {by} is {target}; it must lie in (0, 1].")
    by_row = measure_recall(q, k, tables, scale, key_bias, rows)
    recall = by_row.mean(-1)
    if boost is None:
        boost = recall.new_ones(1)
    boost = boost.unsqueeze(-1)
    if by == "density":
        affordable = tables.density <= target * boost
        choice = torch.where(affordable, recall, -1.0).argmax(-1)
    else:
        error = by_row.std(-1, correction=0) / by_row.shape[-1] ** 0.5
        serves = recall - error >= 1 - (1 - target) / boost
        # Rounding must not cost dense its recall of 1: without any match argmax names the sparsest.
        serves[..., -1] = True
        choice = serves.int().argmax(-1)
    # The sampled rows may lose nothing to a sparser candidate, and the others do.
    choice = torch.where(boost.squeeze(-1) == torch.inf, len(tables.density) - 1, choice)
    return choice.int(), recall


def candidate_names(
    T: int, H: int, W: int, video_start: int, N: int, block_q: int, block_k: int
) -> tuple[str, ...]:
    """What each value of `choice` means on this grid: "temporal 1x1", "textural 4", "dense"..."""
    return build_tables(T, H, W, video_start, N, block_q, block_k, torch.device("cpu")).names


def kind_of(choice: int, tables: Tables) -> HeadKind:
    """The kind of head that a value of `choice` stands for."""
    return tables.patterns[choice].kind


@torch.library.impl(_library, "rainfusion_recognize_v1", "CompositeExplicitAutograd")
def _recognize(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    T: int,
    H: int,
    W: int,
    video_start: int,
    block_q: int,
    block_k: int,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tables = build_tables(T, H, W, video_start, q.shape[2], block_q, block_k, q.device)
    by: Literal["quality", "density"] = "density" if by_density else "quality"
    choice, recall = recognize(q, k, tables, scale, target, by, key_bias, boost=boost)
    chosen = choice.long().unsqueeze(-1)
    return choice, recall.gather(-1, chosen).squeeze(-1), tables.density[choice]


@torch.library.register_fake("ditopt::rainfusion_recognize_v1", lib=_library)
def _describe_recognition(
    q: Tensor, k: Tensor, key_bias: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    shape = q.shape[:2]
    return (
        q.new_empty(shape, dtype=torch.int32),
        q.new_empty(shape, dtype=torch.float32),
        q.new_empty(shape, dtype=torch.float32),
    )


@torch.library.impl(_library, "rainfusion_plan_v1", "CompositeExplicitAutograd")
def _plan(
    choice: Tensor, N: int, T: int, H: int, W: int, video_start: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tables = build_tables(T, H, W, video_start, N, block_q, block_k, choice.device)
    flat = choice.flatten().long()
    order = tables.order_of[flat]
    chosen = (
        tables.counts[flat],
        tables.indices[flat],
        tables.orders[order],
        tables.inverses[order],
    )
    counts, indices, rows, inverse = (entry.unflatten(0, choice.shape) for entry in chosen)
    return counts, indices, rows, inverse


@torch.library.register_fake("ditopt::rainfusion_plan_v1", lib=_library)
def _describe_plan(
    choice: Tensor, N: int, T: int, H: int, W: int, video_start: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_blocks, key_blocks = (N + block_q - 1) // block_q, (N + block_k - 1) // block_k
    return (
        choice.new_empty((*choice.shape, query_blocks), dtype=torch.int32),
        choice.new_empty((*choice.shape, query_blocks, key_blocks), dtype=torch.int32),
        choice.new_empty((*choice.shape, N), dtype=torch.int64),
        choice.new_empty((*choice.shape, N), dtype=torch.int64),
    )


def _check_shapes(q: Tensor, k: Tensor, tables: Tables) -> None:
    tokens = tables.layout.tokens
    if q.shape[2] != tokens or k.shape[2] != tokens:
        raise ValueError(
            f"RainFusion is for self-attention over {tokens} tokens, but got {q.shape[2]} queries "
            f"and {k.shape[2]} keys; leave cross-attention dense."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly.")
