"""Sample clips with the diffusers flow-matching scheduler and classifier-free guidance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage] - lazy

from dit_opt.demo import clips

GUIDANCE = 3.0
SHIFT = 2.0
STEPS = 20


@dataclass(frozen=True)
class Step:
    """One finished denoising step: its number, its seconds, the latents `[1, 3, T, H, W]`."""

    index: int
    seconds: float
    latents: torch.Tensor


def make_scheduler(steps: int, device: str | torch.device = "cpu") -> Any:
    """The demo's scheduler, with the timesteps of one run."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def denoise(
    model: Callable[..., tuple[torch.Tensor, ...]],
    prompt: clips.Prompt,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    size: tuple[int, int, int] = (clips.FRAMES, clips.HEIGHT, clips.WIDTH),
    device: str | torch.device = "cpu",
) -> Iterator[Step]:
    """Yield the steps of one run; the last one's latents are the clip, about in [-1, 1].

    The two guidance branches are two calls, as the video pipelines of diffusers make them.
    """
    scheduler = make_scheduler(steps, device)
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    latents = noise.to(device)
    places = clips.locate(size)[None].to(device)
    texts = [clips.embed([p]).to(device) for p in (prompt, None)]
    for index, timestep in enumerate(scheduler.timesteps):
        began = time.perf_counter()
        with torch.no_grad():
            conditional, unconditional = (
                model(
                    hidden_states=torch.cat([latents, places], 1),
                    timestep=timestep.expand(1),
                    encoder_hidden_states=text,
                    return_dict=False,
                )[0]
                for text in texts
            )
            velocity = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if latents.is_cuda:
            torch.cuda.synchronize()
        yield Step(index, time.perf_counter() - began, latents)


def to_frames(latents: torch.Tensor) -> torch.Tensor:
    """uint8 `[T, H, W, 3]` of a clip `[1, 3, T, H, W]` in [-1, 1]."""
    scaled = (latents[0].float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0)
