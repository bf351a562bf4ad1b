"""RainFusion's search: each head gets the sparsest pattern that keeps its softmax mass.

Heads differ (local in space, local in time, or a texture over the frame) and change with the
prompt, so the choice is made for each head, from a few exact softmax rows, and stays a tensor on
the device. Source: the Adaptive Recognition Module of RainFusion, arXiv 2505.21036; here the recall
is that of the executed block lists, in their own token order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.plan.plan import check_request
from dit_opt.kernels.searches.mass.sampled import measure_sampled_mass
from dit_opt.kernels.searches.rainfusion.sample import count_rows, draw_sample
from dit_opt.kernels.searches.rainfusion.tables import Tables, build_tables

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
    q: Tensor, k: Tensor, key_bias: Tensor | None, scale: float, tables: Tables
) -> Tensor:
    """The softmax mass that each candidate's block lists hold for sampled queries, [B, H, C, m].

    By a float32 softmax over all keys, of scores in the dtype of the keys; a row without any key
    counts as fully kept. q [B, H, N, D] and k [B, Hk, N, D] may have any strides, Hk divides H;
    key_bias is additive, [B or 1, H or 1, N]. Raises ValueError for shapes that do not fit.
    """
    batch, heads = q.shape[:2]
    check_request(q, k, tables.blocks)
    sample = draw_sample(tables, count_rows(tables.layout))
    count, blocks = sample.rows.numel(), sample.kept.shape[-1]
    by_row = q.new_empty(
        (count, blocks, batch, k.shape[1], heads // k.shape[1]), dtype=torch.float32
    )
    for part in measure_sampled_mass(q, k, sample.rows, tables.sums, scale, key_bias):
        by_row[part.rows, :, part.item, part.keys, part.group] = part.mass.permute(3, 1, 0, 2)
    by_row = by_row.flatten(2)
    kept = torch.bmm(sample.kept, by_row).unflatten(2, (batch, heads)).permute(2, 3, 1, 0)
    # The dense candidate is the last one and keeps everything.
    total = kept[:, :, -1:]
    return torch.where(total > 0, kept / total, 1.0)


def recognize(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    tables: Tables,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The candidate of each head, int32 [B, H], and the mean recall of all, float32 [B, H, C].

    By quality: the sparsest candidate whose mean recall, less one standard error of that mean,
    reaches `target`. The margin corrects for choosing the sparsest of several noisy estimates, and
    is larger for a head whose rows disagree. Dense always qualifies. By density: the best mean
    recall among the candidates of density <= `target`, or the sparsest candidate if there is none.
    Arguments as in `measure_recall`. `boost`, float32 [B, H], 1 or more: a quality lets the head
    drop 1 / boost as much, a density lets it be boost times as dense; an infinite one makes it
    dense. Raises ValueError for a target outside (0, 1].
    """
    if not 0 < target <= 1:
        name = "density" if by_density else "quality"
        raise ValueError(f"The target {name} is {target}; it must lie in (0, 1].")
    by_row = measure_recall(q, k, key_bias, scale, tables)
    recall = by_row.mean(-1)
    if boost is None:
        boost = recall.new_ones(1)
    boost = boost.unsqueeze(-1)
    if by_density:
        affordable = tables.density <= target * boost
        choice = torch.where(affordable, recall, -1.0).argmax(-1)
    else:
        error = by_row.std(-1, correction=0) / by_row.shape[-1] ** 0.5
        qualifies = recall - error >= 1 - (1 - target) / boost
        # Rounding may leave dense under a target of 1, and argmax would then name the sparsest.
        qualifies[..., -1] = True
        choice = qualifies.int().argmax(-1)
    # A sparser candidate may lose nothing on the sampled rows, and something on the others.
    choice = torch.where(boost.squeeze(-1) == torch.inf, len(tables.density) - 1, choice)
    return choice.int(), recall


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
    choice, recall = recognize(q, k, key_bias, scale, target, by_density, tables, boost)
    chosen = choice.long().unsqueeze(-1)
    return choice, recall.gather(-1, chosen).squeeze(-1), tables.density[choice]


@torch.library.register_fake("ditopt::rainfusion_recognize_v1", lib=_library)
def _fake_recognize(q, *_):
    dtypes = (torch.int32, torch.float32, torch.float32)
    return tuple(q.new_empty(q.shape[:2], dtype=dtype) for dtype in dtypes)


@torch.library.impl(_library, "rainfusion_plan_v1", "CompositeExplicitAutograd")
def _plan(
    choice: Tensor, N: int, T: int, H: int, W: int, video_start: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tables = build_tables(T, H, W, video_start, N, block_q, block_k, choice.device)
    flat = choice.flatten().long()
    order = tables.order_of[flat]
    counts, indices = (x[flat].unflatten(0, choice.shape) for x in (tables.counts, tables.indices))
    rows, inverse = (x[order].unflatten(0, choice.shape) for x in (tables.orders, tables.inverses))
    return counts, indices, rows, inverse


@torch.library.register_fake("ditopt::rainfusion_plan_v1", lib=_library)
def _fake_plan(choice, N, T, H, W, video_start, block_q, block_k):
    rows = (*choice.shape, ceil_div(N, block_q))
    return (
        choice.new_empty(rows, dtype=torch.int32),
        choice.new_empty((*rows, ceil_div(N, block_k)), dtype=torch.int32),
        choice.new_empty((*choice.shape, N), dtype=torch.int64),
        choice.new_empty((*choice.shape, N), dtype=torch.int64),
    )
