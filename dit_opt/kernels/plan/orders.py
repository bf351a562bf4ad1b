"""Token orders: permutations of a sequence in which one kind of attention pattern is compact.

A block-sparse kernel pays for every block that a pattern touches, so a pattern needs an order that
gathers its tokens into few blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Checkerboard steps, coarse to fine; the lattice order has one class for each.
LATTICE_STEPS = (8, 4, 2, 1)


@dataclass(frozen=True)
class VideoLayout:
    """Where the video tokens are in a sequence: row-major (t, h, w) from `video_start` on. All
    others are text.

    Raises ValueError when the grid does not fit into the sequence.
    """

    frames: int
    height: int
    width: int
    video_start: int
    tokens: int

    def __post_init__(self) -> None:
        grid = (self.frames, self.height, self.width)
        if min(grid) < 1:
            raise ValueError(
                f"The grid (T, H, W) = {grid} has an empty axis; every axis needs a token."
            )
        if self.video_start < 0:
            raise ValueError(f"video_start is {self.video_start}; it must be zero or positive.")
        if self.video_start + self.video_tokens > self.tokens:
            raise ValueError(
                f"The grid (T, H, W) = {grid} multiplies to {self.video_tokens} tokens, but only "
                f"{self.tokens - self.video_start} of the {self.tokens} tokens stand at or after "
                f"video_start={self.video_start}; give the grid that the latents really have."
            )

    @property
    def video_tokens(self) -> int:
        """Number of tokens in the grid."""
        return self.frames * self.height * self.width


def locate_tokens(layout: VideoLayout) -> Tensor:
    """The (t, h, w) of each video token, int64 [T*H*W, 3], in sequence order."""
    axes = (torch.arange(size) for size in (layout.frames, layout.height, layout.width))
    return torch.cartesian_prod(*axes).view(-1, 3)


def measure_lattice(positions: Tensor) -> Tensor:
    """The largest checkerboard step that holds each token: the largest of (8, 4, 2, 1) that divides
    h - w.

    This is RainFusion's set {h mod tau = k and w mod tau = k for some k}; a token with level >= tau
    is in the checkerboard tau, because the sets are nested.
    """
    diagonal = positions[:, 1] - positions[:, 2]
    level = torch.ones_like(diagonal)
    for step in reversed(LATTICE_STEPS):
        level = torch.where(diagonal % step == 0, step, level)
    return level


def order_raster(layout: VideoLayout) -> Tensor:
    """Frame after frame, as the model has them; compact for Spatial heads. int64 [N]."""
    return _append_text(torch.arange(layout.video_tokens), layout)


def order_columns(layout: VideoLayout, strip: int) -> Tensor:
    """Columns of `strip` positions, each through all frames; compact for Temporal heads. int64 [N].

    Columns of one strip of rows follow each other along w, so a block holds a few neighbouring
    columns over many frames, for any T; tiles wider than one column were never better. Every other
    strip runs backwards, so that a block across two strips is compact, too.
    """
    t, h, w = locate_tokens(layout).unbind(1)
    row = h // strip
    column = row * layout.width + torch.where(row % 2 == 0, w, layout.width - 1 - w)
    key = (column * layout.frames + t) * layout.height + h
    return _append_text(key.argsort(), layout)


def order_lattice(layout: VideoLayout) -> Tensor:
    """Checkerboard classes, coarse to fine, each in raster order; compact for Textural heads. int64
    [N].

    The keys of the checkerboards 8, 4 and 2 are prefixes of about 1/8, 1/4 and 1/2 of the video.
    """
    level = measure_lattice(locate_tokens(layout))
    return _append_text(level.argsort(stable=True, descending=True), layout)


def order_cubes(layout: VideoLayout, cube: tuple[int, int, int] = (4, 4, 4)) -> Tensor:
    """Cubes of about `cube` = (t, h, w) positions, each next to the one before it; compact for
    every local pattern. int64 [N]. Raises ValueError for an empty cube.

    The video is cut into layers of frames and each layer into beams along w, which are swept to
    and fro. Blocks of ct * ch * cw consecutive tokens are then cubes wherever they start, because
    a beam is swept column by column, and two of them are a compact box.

    Axes that are no multiples are cut evenly, not into cubes and slivers: 21 frames make layers of
    5, 4, 4, 4 and 4, and a layer of another thickness gets beams of another height, so that blocks
    keep their shape. Raggedness costs little: blocks of 64 tokens stray from their middle by 2.00
    positions (rms) on a grid of 21 x 45 x 80, by 1.94 where every axis divides, and by 2.13 with
    ragged cubes of 4 x 4 x 4, whose slivers reach 16 positions far.
    """
    if min(cube) < 1:
        raise ValueError(f"The cube {cube} has an empty axis; every axis needs a position.")
    t, h, w = locate_tokens(layout).unbind(1)
    layer_of = cut_evenly(layout.frames, cube[0])
    beams = 0
    beam_of = torch.empty((layout.frames, layout.height), dtype=torch.int64)
    for layer, thickness in enumerate(layer_of.bincount().tolist()):
        rows = cut_evenly(layout.height, cube[1] * (cube[0] / thickness) ** 0.5)
        # Every other layer is visited from below, so that it begins beside the end of the last.
        beam_of[layer_of == layer] = beams + (rows if layer % 2 == 0 else rows[-1] - rows)
        beams += int(rows[-1]) + 1
    beam = beam_of[t, h]
    column = beam * layout.width + torch.where(beam % 2 == 0, w, layout.width - 1 - w)
    key = (column * layout.height + h) * layout.frames + t
    return _append_text(key.argsort(), layout)


def invert_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, along its last dimension."""
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def _append_text(video: Tensor, layout: VideoLayout) -> Tensor:
    before = torch.arange(layout.video_start)
    after = torch.arange(layout.video_start + layout.video_tokens, layout.tokens)
    return torch.cat([video + layout.video_start, before, after])


def cut_evenly(length: int, size: float) -> Tensor:
    """The part of each position when an axis is cut into parts of about `size`, int64 [length]."""
    parts = min(max(round(length / size), 1), length)
    return torch.arange(length) * parts // length
