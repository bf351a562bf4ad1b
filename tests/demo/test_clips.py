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
