"""Where a given grid goes, on layouts of small graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dit_opt.facts.layouts import SegmentKind, TokenGrid
from dit_opt.facts.sites import find_sites
from dit_opt.facts.tokens import find_tokens
from dit_opt.options import OptionError
from dit_opt.policy.given_grid import apply_grid
from tests.graphs import capture_one

GRID = (3, 4, 5)


def attend(x):
    """[B, N, 16] -> [B, N, 16] by one head."""
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def apply(given, function, *args):
    gm = capture_one(function, *args)
    sites = find_sites(gm.graph)
    tokens = find_tokens(gm.graph, sites)
    return apply_grid(given, sites, [tokens.layouts[site.node] for site in sites])


def end(x):
    """What follows is not known to be made of these tokens."""
    return x.roll(1, 1)


def tokens(count):
    return torch.randn(2, count, 16)


def test_an_input_that_is_not_seen_to_reach_the_output_takes_the_grid():
    def model(x, text):
        image, words = end(attend(x)), end(attend(text))
        return end(attend(torch.cat([image, words], 1)))

    image, words, joint = apply(GRID, model, tokens(60), tokens(8))
    assert image.latents.source == "x" and image.grid.sizes == GRID
    assert image.key == image.query
    assert words.grid is None and words.latents is None and "60 tokens" in words.reason
    assert (joint.latents.start, joint.latents.stop) == (0, 60)


def test_inputs_that_cannot_be_told_apart_are_an_error():
    def model(x, text):
        return end(attend(x)), end(attend(text))

    with pytest.raises(OptionError, match=r"grid=\(3, 4, 5\) fits .* several inputs \(text, x\)"):
        apply(GRID, model, tokens(60), tokens(60))


def test_text_is_never_the_latents_where_others_are():
    def model(x, text):
        return attend(x) + attend(text).mean(1, keepdim=True)

    with pytest.raises(OptionError, match=r"is 60 tokens.*hold 60, 72"):
        apply(GRID, model, tokens(72), tokens(60))


def test_latents_inside_of_more_tokens_are_an_error_that_says_so():
    with pytest.raises(OptionError, match=r"hold 72, and nothing .* where among them"):
        apply(GRID, lambda x: end(attend(x)), tokens(72))


def two_factors(x):
    frames, places = torch.arange(3.0)[:, None], torch.arange(20.0)[None]
    return attend(x + (frames * places).flatten()[None, :, None])


def test_frames_are_assumed_to_be_one_until_the_grid_is_given():
    gm = capture_one(two_factors, tokens(60))
    (site,) = find_sites(gm.graph)
    (found,) = find_tokens(gm.graph, [site]).layouts.values()
    assert found.grid == TokenGrid((1, 3, 20), "tables", assumed=True)
    for given in (GRID, (3, 1, 20), (1, 3, 20), (3, 20, 1)):
        (layout,) = apply(given, two_factors, tokens(60))
        assert layout.grid == TokenGrid(given, "option") and layout.reason == ""


@pytest.mark.parametrize("given", [(5, 4, 3), (1, 4, 15), (2, 6, 5)])
def test_a_grid_that_cuts_the_proved_factors_contradicts_them(given):
    with pytest.raises(OptionError, match=r"contradicts the graph, which proves \(1, 3, 20\)"):
        apply(given, two_factors, tokens(60))


def test_a_proved_grid_is_not_overridden():
    def model(x):
        table = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in GRID), indexing="ij"))
        return attend(x + table.flatten(1).sum(0)[None, :, None])

    (layout,) = apply(GRID, model, tokens(60))
    assert layout.grid == TokenGrid(GRID, "tables")
    with pytest.raises(OptionError, match="contradicts"):
        apply((1, 12, 5), model, tokens(60))


def test_no_sites_need_no_grid():
    assert apply_grid(GRID, [], []) == []


def test_a_segment_of_latents_comes_first():
    def model(x, text):
        return attend(torch.cat([text, x], 1))[:, 60:]

    (layout,) = apply(GRID, model, tokens(60), tokens(60))
    assert [s.kind for s in layout.query] == [SegmentKind.TEXT, SegmentKind.LATENTS]
    assert dataclasses.replace(layout, grid=None).latents.start == 60
