"""How the records of the zoo say their inputs: each function here returns a `Call` for later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from zoo.record import TEXT, B, Call, H, T, W


def call(function: Callable[..., Any] | str, *arguments: Any, **keywords: Any) -> Call:
    """Any function, or where to import it from."""
    return Call(function, arguments, keywords)


def deferred(function: Callable[..., Any]) -> Callable[..., Call]:
    """A function whose calls are recorded, and made once the sizes are known."""

    @functools.wraps(function)
    def record(*arguments: Any, **keywords: Any) -> Call:
        return Call(function, arguments, keywords)

    return record


@deferred
def draw(*shape: int) -> torch.Tensor:
    """Normal random numbers, the same ones for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def draw_text(tokens: Any = TEXT, width: int = 16) -> Call:
    """Features of a text encoder."""
    return draw(B, tokens, width)


def draw_video(channels: int = 4, frames: Any = T) -> Call:
    """Latents `[B, C, T, H, W]` for patches of (1, 2, 2)."""
    return draw(B, channels, frames, 2 * H, 2 * W)


def draw_image(channels: int = 4) -> Call:
    """Latents `[B, C, H, W]` for patches of (2, 2)."""
    return draw(B, channels, 2 * H, 2 * W)


def fill(value: float | bool, *shape: Any) -> Call:
    """One value everywhere, by default one for each sample; its type is that of the value."""
    return call(torch.full, shape or (B,), value)


@deferred
def count(start: int, stop: int, *lead: int) -> torch.Tensor:
    """The numbers from start to stop, repeated over leading dimensions."""
    return torch.arange(start, stop).repeat(*lead, 1)


@deferred
def runs(*values_and_lengths: tuple[float | bool, int]) -> torch.Tensor:
    """`[1, N]`: each value as often as is said."""
    return torch.cat([torch.full((1, length), value) for value, length in values_and_lengths], 1)


@deferred
def mask(batch: int, tokens: int, padded: int = 2, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """`[batch, tokens]` without the padding at the end, which is a token longer in each sample."""
    valid = tokens - padded - torch.arange(batch)
    return (torch.arange(tokens) < valid[:, None]).to(dtype)


@deferred
def number_positions(
    pictures: int,
    rows: int,
    columns: int,
    *lead: int,
    axes: int = 3,
    step: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Ids `[*lead, tokens, axes]`: the picture's number times step, row, column, zeros."""
    positions = torch.zeros(pictures, rows, columns, axes, dtype=dtype)
    positions[..., 0] = step * torch.arange(pictures)[:, None, None]
    positions[..., 1] = torch.arange(rows)[:, None]
    positions[..., 2] = torch.arange(columns)
    return positions.reshape(*lead, -1, axes)


# Padded text of two encoders, as the newer Hunyuan models take it.
TWO_ENCODERS = {
    "encoder_hidden_states": draw_text(30),
    "encoder_attention_mask": mask(B, 30, dtype=torch.float32),
    "encoder_hidden_states_2": draw_text(20, 12),
    "encoder_attention_mask_2": mask(B, 20, dtype=torch.float32),
}
