"""Make the order of tokens that serves all heads of a model alike."""

from __future__ import annotations

import functools

import torch

from dit_opt.kernels.routers.orders import VideoLayout, invert_order, order_cubes

_lib = torch.library.Library("ditopt", "FRAGMENT")
_lib.define(
    "cube_order_v1(Tensor like, SymInt T, SymInt H, SymInt W, SymInt video_start, SymInt N) "
    "-> (Tensor rows, Tensor inverse)"
)


@functools.lru_cache(maxsize=8)
def build_cube_order(
    layout: VideoLayout, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`make_cube_order` of a layout; cached, so not to be written over."""
    video = order_cubes(layout)[: layout.video_tokens]
    rows = torch.arange(layout.tokens)
    rows[layout.video_start : layout.video_start + layout.video_tokens] = video
    return rows.to(device), invert_order(rows).to(device)


def make_cube_order(
    like: torch.Tensor, T: int, H: int, W: int, video_start: int, N: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cubes of a grid (`orders.order_cubes`) and the inverse, int64 `[N]`, on `like`'s device.

    Text stays where it is, so that one order may serve a whole model.
    """
    order = build_cube_order(VideoLayout(T, H, W, video_start, N), like.device)
    # Copies, because whoever gets an order may write over it.
    return order[0].clone(), order[1].clone()


def _fake_order(
    like: torch.Tensor, T: int, H: int, W: int, video_start: int, N: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return like.new_empty(N, dtype=torch.int64), like.new_empty(N, dtype=torch.int64)


_lib.impl("cube_order_v1", make_cube_order, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::cube_order_v1", _fake_order, lib=_lib)
