"""Generated clips of moving shapes and the prompts that name them.

A data set that needs no download: the generator knows the truth, so prompt following can be scored.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

FRAMES, HEIGHT, WIDTH = 16, 64, 64

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.18),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.88, 0.15, 0.85),
    "cyan": (0.10, 0.82, 0.88),
}
SHAPES = ("disk", "square", "triangle", "ring")
# (rows, columns) of motion, in image coordinates
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}
# pixels from the middle of the frame to a subject's place halfway through its motion: the one named
# first passes up and to the left of the middle, the second down and to the right of it
OFFSET, JITTER = 9.0, 4.0
# pixels per frame
SPEEDS = (1.8, 2.8)
PLACE_CHANNELS = 35
WORDS = (*PALETTE, *SHAPES, *DIRECTIONS)
SLOTS = 2
TOKENS_PER_OBJECT = 3
TEXT_TOKENS = SLOTS * TOKENS_PER_OBJECT
TEXT_DIM = 2 * len(WORDS) + SLOTS + 2


@dataclass(frozen=True)
class Subject:
    """One object that a prompt asks for."""

    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


Prompt = tuple[Subject, ...]


def describe(prompt: Prompt) -> str:
    """The prompt as a sentence."""
    return " and ".join(map(str, prompt)) or "(empty)"


def parse_prompt(text: str) -> Prompt:
    """Read `a red disk moving left and a blue ring moving up` back into subjects.

    Raises ValueError where a phrase lacks a known colour, shape or direction.
    """
    subjects = []
    for phrase in text.split(" and "):
        words = phrase.split()
        found = [[w for w in words if w in known] for known in (PALETTE, SHAPES, DIRECTIONS)]
        if any(len(f) != 1 for f in found):
            raise ValueError(
                f"The phrase {phrase!r} must name one colour of {list(PALETTE)}, one shape of "
                f"{list(SHAPES)} and one direction of {list(DIRECTIONS)}."
            )
        subjects.append(Subject(found[0][0], found[1][0], found[2][0]))
    if len(subjects) > SLOTS or len({s.colour for s in subjects}) < len(subjects):
        raise ValueError(
            f"{text!r} must name at most {SLOTS} subjects, each of a colour of its own."
        )
    return tuple(subjects)


def embed(prompts: list[Prompt | None]) -> torch.Tensor:
    """Text tokens `[B, TEXT_TOKENS, TEXT_DIM]` of prompts; None is the unconditional branch.

    A token says its word, the whole phrase it belongs to (as a contextual text encoder would) and
    its place. An absent subject is a token of its own, unlike the zeros of no prompt at all.
    """
    out = torch.zeros(len(prompts), TEXT_TOKENS, TEXT_DIM)
    index = {word: i for i, word in enumerate(WORDS)}
    n = len(WORDS)
    for row, prompt in zip(out, prompts):
        if prompt is None:
            continue
        row[:, -1] = 1
        for slot in range(SLOTS):
            tokens = row[slot * TOKENS_PER_OBJECT : (slot + 1) * TOKENS_PER_OBJECT]
            tokens[:, 2 * n + slot] = 1
            if slot >= len(prompt):
                tokens[:, -2] = 1
                continue
            subject = prompt[slot]
            words = [index[subject.colour], index[subject.shape], index[subject.direction]]
            tokens[:, [n + w for w in words]] = 1
            for token, word in zip(tokens, words):
                token[word] = 1
    return out * 2


def draw_prompt(rng: torch.Generator, subjects: int | None = None) -> Prompt:
    """A random prompt of one or two subjects of different colours."""
    count = subjects or 1 + int(torch.rand((), generator=rng) < 0.85)
    colours = torch.randperm(len(PALETTE), generator=rng)[:count].tolist()
    pick = lambda options: options[int(torch.randint(len(options), (), generator=rng))]  # noqa: E731
    return tuple(Subject(list(PALETTE)[c], pick(SHAPES), pick(list(DIRECTIONS))) for c in colours)


def list_prompts(count: int) -> list[Prompt]:
    """The first `count` evaluation prompts: a fixed shuffle, the same on every machine."""
    rng = torch.Generator().manual_seed(1234)
    return list(itertools.islice((draw_prompt(rng, SLOTS) for _ in itertools.count()), count))


def _distance(shape: str, y: torch.Tensor, x: torch.Tensor, radius: float) -> torch.Tensor:
    """Signed distance in pixels to the outline of a shape, negative inside."""
    if shape == "disk":
        return torch.hypot(y, x) - radius
    if shape == "ring":
        return (torch.hypot(y, x) - 0.78 * radius).abs() - 0.30 * radius
    if shape == "square":
        return torch.maximum(y.abs(), x.abs()) - 0.85 * radius
    sides = [
        math.cos(a) * x + math.sin(a) * y for a in (math.pi / 2, math.pi * 7 / 6, -math.pi / 6)
    ]
    return torch.stack(sides).amax(0) - 0.62 * radius


def _rotate(y: torch.Tensor, x: torch.Tensor, angle) -> tuple[torch.Tensor, torch.Tensor]:
    c, s = torch.cos(angle), torch.sin(angle)
    return c * y - s * x, s * y + c * x


def _drifting_texture(rng: torch.Generator, frames: int, height: int, width: int) -> torch.Tensor:
    """Band-passed noise of unit variance `[T, H, W]` that drifts with one velocity.

    Its phase is random beyond two periods, as in natural textures, so what a pixel tells reaches
    only its surroundings.
    """
    uniform = lambda lo, hi: lo + (hi - lo) * torch.rand((), generator=rng)  # noqa: E731
    ky = torch.fft.fftfreq(height).view(-1, 1)
    kx = torch.fft.rfftfreq(width).view(1, -1)
    period, angle, stretch = uniform(6, 11), uniform(0, math.pi), uniform(1.0, 2.5)
    v, u = _rotate(ky, kx, angle)
    k = torch.hypot(v * stretch, u) * period
    band = torch.exp(-((k - 1) ** 2) / 0.18)
    spectrum = torch.fft.rfft2(torch.randn(height, width, generator=rng)) * band
    t = torch.arange(frames).view(-1, 1, 1)
    drift = torch.exp(-2j * math.pi * t * (ky * uniform(-2, 2) + kx * uniform(-2, 2)))
    field = torch.fft.irfft2(spectrum * drift, s=(height, width))
    return field / field.std()


def render(
    prompt: Prompt, rng: torch.Generator, size: tuple[int, int, int] = (FRAMES, HEIGHT, WIDTH)
) -> torch.Tensor:
    """One clip `[3, T, H, W]` in [-1, 1] that shows the prompt, everything else random."""
    frames, height, width = size
    uniform = lambda lo, hi: lo + (hi - lo) * torch.rand((), generator=rng)  # noqa: E731
    t = torch.arange(frames).view(-1, 1, 1).float()
    y = torch.arange(height).view(1, -1, 1).float()
    x = torch.arange(width).view(1, 1, -1).float()

    tint = uniform(0.30, 0.55) + torch.rand(3, generator=rng).view(3, 1, 1, 1) * 0.16 - 0.08
    clip = tint + 0.13 * torch.tanh(1.5 * _drifting_texture(rng, frames, height, width))

    middle = (frames - 1) / 2
    # the first subject is in front, so it is painted last
    for slot, subject in reversed(list(enumerate(prompt))):
        dy, dx = DIRECTIONS[subject.direction]
        radius, speed = uniform(7.5, 11.5), uniform(*SPEEDS)
        away = (2 * slot - 1) * OFFSET if len(prompt) > 1 else 0
        cy = (height - 1) / 2 + away + uniform(-JITTER, JITTER)
        cx = (width - 1) / 2 + away + uniform(-JITTER, JITTER)
        v, u = _rotate(
            y - (cy + dy * speed * (t - middle)),
            x - (cx + dx * speed * (t - middle)),
            uniform(0, 6.28) + uniform(-0.25, 0.25) * t,
        )
        alpha = torch.sigmoid(-3.0 * _distance(subject.shape, v, u, float(radius)))
        stripes = torch.tanh(3 * torch.sin(u * (2 * math.pi / uniform(4.0, 7.0))))
        shade = (0.80 + 0.20 * stripes).clamp(0, 1)
        colour = torch.tensor(PALETTE[subject.colour]).view(3, 1, 1, 1)
        clip = clip * (1 - alpha) + colour * shade * alpha
    return clip.clamp(0, 1) * 2 - 1


def locate(size: tuple[int, int, int] = (FRAMES, HEIGHT, WIDTH)) -> torch.Tensor:
    """Where every pixel is, `[PLACE_CHANNELS, T, H, W]`: t, y and x from the middle of the clip,
    about in [-1, 1]; y and x as something sees them that moves up, down, left or right at the mean
    speed; and the sines and cosines of all of these.

    The model takes them as further input channels (Liu et al. 2018, CoordConv): rotary embedding
    tells it distances only, from which nothing follows about where in the frame a token is.
    """
    axes = [
        (torch.arange(n) - (n - 1) / 2) / (whole / 2)
        for n, whole in zip(size, (FRAMES, HEIGHT, WIDTH))
    ]
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    rise, run = (sum(SPEEDS) / 2 * FRAMES / whole * t for whole in (HEIGHT, WIDTH))
    places = torch.stack([t, y, x, y - rise, y + rise, x - run, x + run])
    waves = [f(math.pi * k * places) for k in (1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat([places, *waves])


def draw_batch(count: int, rng: torch.Generator) -> tuple[torch.Tensor, list[Prompt]]:
    """Clips `[B, 3, T, H, W]` and their prompts."""
    prompts = [draw_prompt(rng) for _ in range(count)]
    return torch.stack([render(p, rng) for p in prompts]), prompts
