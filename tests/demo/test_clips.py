from __future__ import annotations

import pytest
import torch

from dit_opt.demo import clips
from dit_opt.demo.clips import Subject


def test_parse_prompt_reads_what_describe_wrote():
    for prompt in clips.list_prompts(20):
        assert clips.parse_prompt(clips.describe(prompt)) == prompt


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a pink disk moving left", "pink"),
        ("a red cow moving left", "cow"),
        ("a red disk", "direction"),
        ("a red blue disk moving left", "one colour"),
        ("", "one colour"),
        ("a red disk moving left and a red ring moving up", "colour of its own"),
        (
            "a red disk moving left and a blue disk moving up and a cyan disk moving up",
            "at most 2",
        ),
    ],
)
def test_parse_prompt_refuses(text, names):
    with pytest.raises(ValueError, match=names):
        clips.parse_prompt(text)


def test_list_prompts_is_a_fixed_list_of_two_subjects():
    prompts = clips.list_prompts(8)
    assert prompts == clips.list_prompts(20)[:8]
    assert all(len(p) == clips.SLOTS for p in prompts)
    assert all(p[0].colour != p[1].colour for p in prompts)


def test_embed_tells_prompts_slots_and_no_prompt_apart():
    a, b = Subject("red", "disk", "left"), Subject("blue", "ring", "up")
    prompts = [(a, b), (b, a), (a,), None]
    text = clips.embed(prompts)
    assert text.shape == (4, clips.TEXT_TOKENS, clips.TEXT_DIM)
    assert torch.equal(text[3], torch.zeros_like(text[3]))
    flat = text.flatten(1)
    assert all((flat[i] != flat[j]).any() for i in range(4) for j in range(i))
    # an absent subject is a token of its own
    assert text[2, clips.TOKENS_PER_OBJECT :].any()


def test_render_is_in_range_and_repeatable():
    prompt = (Subject("red", "disk", "left"),)
    one, two = (
        clips.render(prompt, torch.Generator().manual_seed(3), (4, 32, 32)) for _ in range(2)
    )
    assert one.shape == (3, 4, 32, 32)
    assert one.min() >= -1 and one.max() <= 1
    assert torch.equal(one, two)


def test_places_are_counted_from_the_middle_of_the_clip():
    places = clips.locate()
    assert places.shape == (clips.PLACE_CHANNELS, clips.FRAMES, clips.HEIGHT, clips.WIDTH)
    assert places[:3].abs().max() < 1 and places[:3].mean((1, 2, 3)).abs().max() < 1e-6
    # pixels keep their place in a smaller clip, whose middle is the same
    inner = places[:, 4:12, 16:48, 16:48]
    torch.testing.assert_close(clips.locate((8, 32, 32)), inner)


@pytest.mark.parametrize("direction", list(clips.DIRECTIONS))
def test_what_moves_at_the_mean_speed_stands_still_in_one_place_channel(direction):
    y, x = clips.DIRECTIONS[direction]
    speed = sum(clips.SPEEDS) / 2
    steps = torch.arange(clips.FRAMES)
    rows = (32 + y * speed * (steps - 7.5)).round().long()
    columns = (32 + x * speed * (steps - 7.5)).round().long()
    seen = clips.locate()[1:7, steps, rows, columns]
    spread = seen.amax(1) - seen.amin(1)
    across = 1 if y else 0
    still = {"up": 3, "down": 2, "left": 5, "right": 4}[direction]
    # up to the rounding to pixels
    assert {i for i, s in enumerate(spread.tolist()) if s < 2 / 64 + 1e-6} == {across, still}


def test_the_first_subject_passes_the_upper_left_and_the_second_the_lower_right():
    rng = torch.Generator().manual_seed(0)
    prompt = (Subject("red", "disk", "left"), Subject("blue", "disk", "up"))
    middle = clips.render(prompt, rng)[:, clips.FRAMES // 2]
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for channel, side in ((0, -1), (2, 1)):
        weight = (middle[channel] - middle[2 - channel]).clamp(min=0)
        weight = torch.where(weight > 0.5, weight, 0)
        for axis in (y, x):
            centre = float((weight * axis).sum() / weight.sum())
            assert side * (centre - 31.5) == pytest.approx(clips.OFFSET, abs=clips.JITTER + 2)
