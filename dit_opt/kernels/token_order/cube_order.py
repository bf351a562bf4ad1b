"""The order of cubes of a video's grid, which lets a key block hold tokens that are neighbours."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dit_opt.kernels.plan.orders import VideoLayout, invert_order, order_cubes


@functools.lru_cache(maxsize=8)
def build_cube_order(layout: VideoLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """`make_cube_order` of a layout. The result is cached, so it must not be written to."""
    video = order_cubes(layout)[: layout.video_tokens]
    rows = torch.arange(layout.tokens)
    rows[layout.video_start : layout.video_start + layout.video_tokens] = video
    return rows.to(device), invert_order(rows).to(device)


def make_cube_order(
    like: Tensor, T: int, H: int, W: int, video_start: int, N: int
) -> tuple[Tensor, Tensor]:
    """The order of cubes of a grid (`orders.order_cubes`) and its inverse, int64 `[N]`.

    Both are on the device of `like`. Text tokens keep their places, so that one order may serve a
    whole model.
    """
    order = build_cube_order(VideoLayout(T, H, W, video_start, N), like.device)
    # Copies, because the caller may write to what an op returns.
    return order[0].clone(), order[1].clone()
