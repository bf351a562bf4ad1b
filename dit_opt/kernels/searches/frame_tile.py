"""Efficient-vDiT's tiles: each frame attends to itself and to a few reference frames.

The lists depend on shapes alone and grow linearly with the number of frames. Source:
Efficient-vDiT, arXiv 2502.06155, which chooses among such masks for each layer; here the density
does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.plan.plan import lay_blocks, list_kept, new_plan
from dit_opt.kernels.searches.rainfusion.patterns import Boxes, HeadKind, Pattern, box_blocks

_DIAGONAL = Pattern(HeadKind.SPATIAL, reach=(0, None, None))

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "frame_tile_plan_v1(Tensor like_q, float density, SymInt T, SymInt H, SymInt W, "
    "SymInt video_start, int block_q, int block_k, Tensor? boost=None) "
    "-> (Tensor counts, Tensor indices, Tensor recall, Tensor density)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@dataclass(frozen=True, eq=False)
class FrameTiles:
    """The mask of one grid as lists: `counts` int32 [nq] and `indices` int32 [nq, nk], on a device.

    `references` is the number of reference frames, `density` the kept share in real tokens.
    """

    references: int
    density: float
    counts: Tensor
    indices: Tensor


@functools.lru_cache(maxsize=8)
def build_tiles(
    layout: VideoLayout, density: float, block_q: int, block_k: int, device: torch.device
) -> FrameTiles:
    """The tiles with the most reference frames that keep no more than `density`; cached.

    In the model's own token order: all queries keep the key blocks with text, and query blocks with
    text keep all. There are no reference frames where own frames and text alone keep more than
    `density`. Raises ValueError for a density outside (0, 1] or an empty block.
    """
    if not 0 < density <= 1:
        raise ValueError(f"The target density is {density}; it must lie in (0, 1].")
    cpu, start, video = torch.device("cpu"), layout.video_start, layout.video_tokens
    blocks = lay_blocks(layout.tokens, start, video, block_q, block_k, cpu)
    order = torch.arange(layout.tokens)
    queries, keys = (box_blocks(layout, order, block) for block in (block_q, block_k))
    areas = torch.outer(blocks.query_sizes.double(), blocks.key_sizes.double())
    own_tiles = _DIAGONAL.lift(queries, keys)

    def cover(references: int) -> tuple[Tensor, float]:
        kept = own_tiles | _touch_references(keys, layout.frames, references)
        return kept, float((areas * kept).sum() / areas.sum())

    references = layout.frames
    kept, realised = cover(references)
    while references and realised > density:
        references -= 1
        kept, realised = cover(references)
    counts, indices = (x.to(device) for x in list_kept(kept))
    return FrameTiles(references, realised, counts, indices)


def _touch_references(keys: Boxes, frames: int, references: int) -> Tensor:
    """Which blocks hold keys of the reference frames, spread evenly over the video: bool [nk]."""
    chosen = torch.tensor([(2 * i + 1) * frames // (2 * references) for i in range(references)])
    low, high = keys.low[:, :1], keys.high[:, :1]
    return ((chosen >= low) & (chosen <= high)).any(-1)


@torch.library.impl(_library, "frame_tile_plan_v1", "CompositeExplicitAutograd")
def plan(
    like_q: Tensor,
    density: float,
    T: int,
    H: int,
    W: int,
    video_start: int,
    block_q: int,
    block_k: int,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same lists for every head of queries [B, H, N, D], with B = 1; their recall is unknown.

    With a boost, float32 [B, H], the lists of each item: heads whose boost is infinite keep every
    block, others what they had. Raises as `build_tiles` does.
    """
    layout = VideoLayout(T, H, W, video_start, like_q.shape[2])
    tiles = build_tiles(layout, density, block_q, block_k, like_q.device)
    batch, heads = 1 if boost is None else boost.shape[0], like_q.shape[1]
    # Copies, because the caller may write to its plan.
    counts, indices = tiles.counts.repeat(batch, heads, 1), tiles.indices.repeat(batch, heads, 1, 1)
    recall = like_q.new_full((batch, heads), torch.nan, dtype=torch.float32)
    kept = torch.full_like(recall, tiles.density)
    if boost is not None:
        dense, key_blocks = boost == torch.inf, indices.shape[-1]
        every = torch.arange(key_blocks, dtype=torch.int32, device=like_q.device)
        counts = torch.where(dense[..., None], key_blocks, counts).int()
        indices = torch.where(dense[..., None, None], every, indices)
        kept = kept.masked_fill(dense, 1.0)
    return counts, indices, recall, kept


@torch.library.register_fake("ditopt::frame_tile_plan_v1", lib=_library)
def _fake(like_q, density, T, H, W, video_start, block_q, block_k, boost=None):
    batch = like_q[:1] if boost is None else like_q.expand(boost.shape[0], -1, -1, -1)
    return new_plan(batch, like_q, block_q, block_k)
