"""Token orders: permutations of a sequence in which one kind of attention pattern is compact.

A block-sparse kernel pays for every block that a pattern touches, so each pattern is worth only as
much as the order that gathers its tokens into few blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Checkerboard spacings, coarse to fine; each class of the lattice order holds one of them.
LATTICE_STEPS = (8, 4, 2, 1)


@dataclass(frozen=True)
class VideoLayout:
    """Where the video tokens stand in a sequence: row-major (t, h, w) from `video_start` on; all
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
    """The widest checkerboard that holds each token: the largest step in (8, 4, 2, 1) that divides
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
    columns over many frames, whatever T is; wider tiles than one column never held fewer. Every
    other strip runs backwards, so that a block across two strips stays in one corner.
    """
    t, h, w = locate_tokens(layout).unbind(1)
    row = h // strip
    column = row * layout.width + torch.where(row % 2 == 0, w, layout.width - 1 - w)
    key = (column * layout.frames + t) * layout.height + h
    return _append_text(key.argsort(), layout)


def order_lattice(layout: VideoLayout) -> Tensor:
    """Checkerboard classes, widest first, raster inside each; compact for Textural heads. int64
    [N].

    The keys of the checkerboards 8, 4 and 2 are prefixes of about 1/8, 1/4 and 1/2 of the video.
    """
    level = measure_lattice(locate_tokens(layout))
    return _append_text(level.argsort(stable=True, descending=True), layout)


def invert_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, along its last dimension."""
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def _append_text(video: Tensor, layout: VideoLayout) -> Tensor:
    before = torch.arange(layout.video_start)
    after = torch.arange(layout.video_start + layout.video_tokens, layout.tokens)
    return torch.cat([video + layout.video_start, before, after])
