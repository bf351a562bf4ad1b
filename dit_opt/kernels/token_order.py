"""Make token orders, and move tokens into and out of the one that each head wants.

Rows of one head are short and contiguous in the layouts that models use, so one `index_select`
over all of them costs about a copy; elementwise gathers cost several.
"""

from __future__ import annotations

import functools

import torch

from dit_opt.kernels.routers.orders import VideoLayout, invert_order, order_cubes

_lib = torch.library.Library("ditopt", "FRAGMENT")
_lib.define("gather_tokens_v1(Tensor x, Tensor rows) -> Tensor")
_lib.define("scatter_tokens_v1(Tensor x, Tensor inverse) -> Tensor")
_lib.define("gather_bias_v1(Tensor bias, Tensor rows) -> Tensor")
_lib.define(
    "cube_order_v1(Tensor like, SymInt T, SymInt H, SymInt W, SymInt video_start, SymInt N) "
    "-> (Tensor rows, Tensor inverse)"
)


def _offsets(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` as a matrix of rows without a copy where it can be, and each head's row numbers."""
    batch, heads, tokens, dim = x.shape
    if x.transpose(1, 2).is_contiguous():
        table, per_token, per_head = x.transpose(1, 2).reshape(-1, dim), heads, 1
    else:
        table, per_token, per_head = x.reshape(-1, dim), 1, tokens
    b = torch.arange(batch, device=x.device).view(-1, 1, 1) * (tokens * heads)
    # query heads of one group share a key head
    h = torch.arange(rows.shape[1], device=x.device).view(1, -1, 1) // (rows.shape[1] // heads)
    return table, b + h * per_head + rows * per_token


def gather_tokens(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`out[b, h, i] = x[b, h // group, rows[b, h, i]]`.

    Args:
        x: `[B, Hk, N, D]`, any strides; `[B, N, Hk, D]` memory costs no copy.
        rows: int64 `[B, H, N]`, H a multiple of Hk.

    Returns:
        `[B, H, N, D]`, contiguous.
    """
    batch, heads, count = rows.shape
    table, index = _offsets(x, rows)
    return table.index_select(0, index.reshape(-1)).view(batch, heads, count, x.shape[-1])


def scatter_tokens(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`out[b, h, n] = x[b, h, inverse[b, h, n]]`, in `[B, N, H, D]` memory.

    Args:
        x: `[B, H, N, D]`. inverse: int64 `[B, H, N]`, the inverse permutations of the rows.
    """
    batch, heads, count, dim = x.shape
    table, index = _offsets(x, inverse)
    flat = index.transpose(1, 2).reshape(-1)
    return table.index_select(0, flat).view(batch, count, heads, dim).transpose(1, 2)


def gather_bias(bias: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A key bias `[B or 1, H or 1, N]` in each head's order, `[B, H, N]`."""
    return bias.expand(rows.shape[0], rows.shape[1], -1).gather(2, rows)


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


def _fake_gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*rows.shape, x.shape[-1]))


def _fake_scatter(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    batch, heads, count, dim = x.shape
    return x.new_empty((batch, count, heads, dim)).transpose(1, 2)


def _fake_bias(bias: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return bias.new_empty(rows.shape)


for _name, _real, _fake in (
    ("gather_tokens_v1", gather_tokens, _fake_gather),
    ("scatter_tokens_v1", scatter_tokens, _fake_scatter),
    ("gather_bias_v1", gather_bias, _fake_bias),
    ("cube_order_v1", make_cube_order, _fake_order),
):
    _lib.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditopt::{_name}", _fake, lib=_lib)


@torch.library.impl(_lib, "gather_tokens_v1", "CUDA")
def _gather_on_gpu(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # Imported here because Triton is absent where there is no GPU to run it on.
    from dit_opt.kernels import token_order_triton

    return token_order_triton.gather_tokens(x, rows)


@torch.library.impl(_lib, "scatter_tokens_v1", "CUDA")
def _scatter_on_gpu(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    from dit_opt.kernels import token_order_triton

    return token_order_triton.scatter_tokens(x, inverse)
