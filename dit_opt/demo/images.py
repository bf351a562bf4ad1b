"""Compare two clips in numbers and in pictures.

A speedup says nothing before one has seen what it did to the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import structural_similarity

from dit_opt.demo.sampler import to_frames

# what identical clips get: infinity is no JSON
MAX_PSNR_DB = 150.0

UPSCALE = 4
AMPLIFY = 4
FRAME_SECONDS = 0.125

MARGIN = 16
TITLE_SIZE = 40
LABEL_SIZE = 30


@dataclass(frozen=True)
class Likeness:
    """How near a clip is to a reference: PSNR in dB, SSIM as the mean over frames."""

    psnr_db: float
    ssim: float


def compare_clips(clip: torch.Tensor, reference: torch.Tensor) -> Likeness:
    """PSNR and SSIM of clips `[1, 3, T, H, W]`, clamped to [-1, 1] and compared as [0, 1].

    SSIM's luminance term (Wang et al. 2004) takes values around zero for black. Identical clips get
    `MAX_PSNR_DB`. Raises ValueError where the shapes differ.
    """
    if clip.shape != reference.shape:
        raise ValueError(
            f"Clips of shapes {tuple(clip.shape)} and {tuple(reference.shape)} cannot be compared."
        )
    a, b = ((x[0].double().cpu().clamp(-1, 1) + 1) / 2 for x in (clip, reference))
    error = (a - b).square().mean()
    psnr = -10 * torch.log10(error)
    ssim = [_compare_frames(x, y) for x, y in zip(a.unbind(1), b.unbind(1))]
    return Likeness(min(float(psnr), MAX_PSNR_DB), sum(ssim) / len(ssim))


def amplify_difference(clip: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Their difference times `AMPLIFY`, as a clip in which grey is none."""
    return (clip.clamp(-1, 1) - reference.clamp(-1, 1)) * AMPLIFY


def write_gif(path: Path, clip: torch.Tensor) -> None:
    """An endless animation of a clip `[1, 3, T, H, W]`, enlarged."""
    first, *rest = _enlarge(clip)
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=round(FRAME_SECONDS * 1000),
        loop=0,
    )


def write_contact_sheet(
    path: Path, title: Sequence[str], rows: Sequence[tuple[str, torch.Tensor]]
) -> None:
    """One PNG: a row of enlarged frames for each labelled clip `[1, 3, T, H, W]`.

    Args:
        title: lines above everything.
    """
    pictures = [(label, _enlarge(clip)) for label, clip in rows]
    width, height = pictures[0][1][0].size
    columns = max(len(frames) for _, frames in pictures)
    head = MARGIN + len(title) * (TITLE_SIZE + MARGIN)
    band = LABEL_SIZE + 2 * MARGIN
    sheet = Image.new(
        "RGB",
        (columns * (width + MARGIN) + MARGIN, head + len(rows) * (band + height) + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title):
        place = (MARGIN, MARGIN + i * (TITLE_SIZE + MARGIN))
        draw.text(place, line, fill="black", font=ImageFont.load_default(TITLE_SIZE))
    for r, (label, frames) in enumerate(pictures):
        top = head + r * (band + height)
        font = ImageFont.load_default(LABEL_SIZE)
        draw.text((MARGIN, top + MARGIN // 2), label, fill="black", font=font)
        for c, frame in enumerate(frames):
            sheet.paste(frame, (MARGIN + c * (width + MARGIN), top + band))
    sheet.save(path, format="PNG")


def _enlarge(clip: torch.Tensor) -> list[Image.Image]:
    frames = [Image.fromarray(frame.numpy()) for frame in to_frames(clip)]
    size = (frames[0].width * UPSCALE, frames[0].height * UPSCALE)
    return [f.resize(size, Image.Resampling.NEAREST) for f in frames]


def _compare_frames(frame: torch.Tensor, reference: torch.Tensor) -> float:
    found: Any = structural_similarity(
        frame.numpy(), reference.numpy(), data_range=1.0, channel_axis=0
    )
    return float(found)
