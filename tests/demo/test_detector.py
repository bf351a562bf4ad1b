from __future__ import annotations

import dataclasses
import statistics

import torch

from dit_opt.demo import clips, detector
from dit_opt.demo.clips import Subject

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def render_all(count: int) -> list[tuple[torch.Tensor, clips.Prompt]]:
    rng = torch.Generator().manual_seed(7)
    return [(clips.render(p, rng), p) for p in clips.list_prompts(count)]


def test_true_clips_score_high_and_wrong_prompts_low():
    rendered = render_all(12)
    assert statistics.fmean(detector.score(clip, p) for clip, p in rendered) > 0.95
    reversed_motion = [
        tuple(dataclasses.replace(s, direction=OPPOSITE[s.direction]) for s in p)
        for _, p in rendered
    ]
    scores = [detector.score(c, wrong) for (c, _), wrong in zip(rendered, reversed_motion)]
    # colours are right, directions wrong
    assert 0.45 < statistics.fmean(scores) < 0.55
    absent = [
        tuple(
            dataclasses.replace(s, colour=colour)
            for s, colour in zip(p, [c for c in clips.PALETTE if c not in {s.colour for s in p}])
        )
        for _, p in rendered
    ]
    scores = [detector.score(c, wrong) for (c, _), wrong in zip(rendered, absent)]
    assert statistics.fmean(scores) < 0.05


def test_noise_and_grey_show_nothing():
    prompt = (Subject("green", "square", "down"),)
    assert detector.score(torch.zeros(3, 8, 64, 128), prompt) == 0
    noise = torch.randn(3, 8, 64, 128, generator=torch.Generator().manual_seed(0))
    assert not detector.find_subjects(noise, prompt)[0].direction


def test_a_still_object_has_its_colour_but_no_direction():
    prompt = (Subject("red", "disk", "left"),)
    frame = clips.render(prompt, torch.Generator().manual_seed(0))[:, :1]
    still = frame.expand(-1, clips.FRAMES, -1, -1)
    assert detector.find_subjects(still, prompt) == [detector.Finding(True, False)]
