"""Score whether a clip shows what its prompt asks for.

The detector knows the generator's palette and motions and nothing of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_opt.demo.clips import DIRECTIONS, PALETTE, Prompt

# fewer pixels in a frame are noise: the smallest ring covers about sixty
MIN_PIXELS = 25


@dataclass(frozen=True)
class Finding:
    """One subject: whether its colour is there, and whether it moves as told."""

    colour: bool
    direction: bool

    @property
    def score(self) -> float:
        return (self.colour + self.direction) / 2


def _match(clip: torch.Tensor, colour: str) -> torch.Tensor:
    """Pixels `[T, H, W]` whose hue is the colour's, whatever the shade of the stripes."""
    rgb = (clip.clamp(-1, 1) + 1) / 2
    # stripes scale a colour, so it is compared after its grey part is taken off
    chroma = rgb - rgb.amin(0, keepdim=True)
    strength = chroma.amax(0)
    names = list(PALETTE)
    wanted = torch.tensor([PALETTE[n] for n in names])
    wanted = wanted - wanted.amin(1, keepdim=True)
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    unit = chroma / chroma.norm(dim=0, keepdim=True).clamp_min(1e-6)
    likeness = torch.einsum("nc,cthw->nthw", wanted, unit)
    best = likeness.amax(0)
    index = names.index(colour)
    return (likeness.argmax(0) == index) & (best > 0.95) & (strength > 0.35)


def find_subjects(clip: torch.Tensor, prompt: Prompt) -> list[Finding]:
    """Look for each subject of the prompt in a clip `[3, T, H, W]` in [-1, 1].

    The colour is there when at least half of the frames show it. The direction is right when the
    centre of its pixels moves at least one pixel a frame along the asked axis, on average, and
    further along it than across it.
    """
    findings = []
    height, width = clip.shape[-2:]
    y = torch.arange(height).float().view(1, -1, 1)
    x = torch.arange(width).float().view(1, 1, -1)
    for subject in prompt:
        mask = _match(clip, subject.colour)
        count = mask.sum((1, 2)).float()
        seen = (count >= MIN_PIXELS).nonzero().flatten()
        if len(seen) < max(2, clip.shape[1] // 2):
            findings.append(Finding(False, False))
            continue
        weight = mask[seen].float() / count[seen].view(-1, 1, 1)
        cy, cx = (weight * y).sum((1, 2)), (weight * x).sum((1, 2))
        t = seen.float() - seen.float().mean()
        vy, vx = ((t * c).sum() / t.square().sum() for c in (cy, cx))
        dy, dx = DIRECTIONS[subject.direction]
        along = float(dy * vy + dx * vx)
        across = abs(float(dx * vy)) + abs(float(dy * vx))
        findings.append(Finding(True, along >= 1.0 and along > across))
    return findings


def score(clip: torch.Tensor, prompt: Prompt) -> float:
    """Mean over subjects of (colour there + direction right) / 2; 1 is a perfect clip."""
    findings = find_subjects(clip, prompt)
    return sum(f.score for f in findings) / len(findings)
