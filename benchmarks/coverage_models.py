"""What the tiny models of `benchmarks.coverage` share: their sizes, their inputs, their weights.

T, H and W all differ, so that a swap of two grid axes shows, and are no multiples of what blocks
and tiles are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# A model and its inputs, for a batch of one.
Built = tuple[torch.nn.Module, dict[str, Any]]
Builder = Callable[[], Built]

# Grids in tokens.
FRAMES, ROWS, COLUMNS = 5, 13, 17
IMAGE_ROWS, IMAGE_COLUMNS = 33, 35
IMAGE_TOKENS = IMAGE_ROWS * IMAGE_COLUMNS


def build(builder: Builder) -> Built:
    """A model in eval mode that answers with tuples, and its inputs; always the same ones."""
    torch.manual_seed(0)
    model, inputs = builder()
    seed_weights(model)
    model.eval().requires_grad_(False)
    return model, {**inputs, "return_dict": False}


@torch.no_grad()
def seed_weights(model: torch.nn.Module) -> None:
    """Draw all weights: zero-initialised gates would make the blocks vanish."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Matrices keep the scale of their inputs; vectors (norms, biases) sit near one half.
        noise = torch.randn(parameter.shape, generator=generator)
        flat = parameter.dim() <= 1
        fan_in = 1 if flat else max(1, parameter[0].numel())
        parameter.copy_(0.5 + 0.1 * noise if flat else noise * fan_in**-0.5)


def draw(*shape: int) -> torch.Tensor:
    """Random numbers, the same ones for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def draw_video(channels: int = 4, frames: int = FRAMES) -> torch.Tensor:
    """Latents `[1, C, T, H, W]` for patches of (1, 2, 2)."""
    return draw(1, channels, frames, 2 * ROWS, 2 * COLUMNS)


def draw_image(channels: int = 4) -> torch.Tensor:
    """Latents `[1, C, H, W]` for patches of (2, 2)."""
    return draw(1, channels, 2 * IMAGE_ROWS, 2 * IMAGE_COLUMNS)


def fill(value: float) -> torch.Tensor:
    """One number for the one sample, such as its timestep."""
    return torch.full((1,), value)


def mask_text(tokens: int, padded: int = 2) -> torch.Tensor:
    """A mask `[1, tokens]` of integers that leaves out the padding at the end."""
    return (torch.arange(tokens)[None] < tokens - padded).long()


def number_positions(rows: int, columns: int, axes: int = 3, picture: int = 0) -> torch.Tensor:
    """Positions `[rows * columns, axes]`: number of the picture, row, column and zeros."""
    positions = torch.zeros(rows, columns, axes)
    positions[..., 0] = picture
    positions[..., 1] = torch.arange(rows)[:, None]
    positions[..., 2] = torch.arange(columns)
    return positions.reshape(rows * columns, axes)


def ask_by_two_encoders() -> dict[str, torch.Tensor]:
    """Padded text of two encoders, as the newer Hunyuan models take it."""
    return {
        "encoder_hidden_states": draw(1, 30, 16),
        "encoder_attention_mask": mask_text(30).float(),
        "encoder_hidden_states_2": draw(1, 20, 12),
        "encoder_attention_mask_2": mask_text(20).float(),
    }
