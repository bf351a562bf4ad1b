from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_opt.facts.nodes import input_name
from dit_opt.facts.sites import find_sites
from dit_opt.facts.token_ids import TokenIds, find_token_ids
from dit_opt.facts.tokens import find_tokens
from tests.graphs import capture_one
from zoo import small


def positions_of(function, *args, **kwargs):
    """The places by name of the input."""
    gm = capture_one(function, *args, **kwargs)
    sites = find_sites(gm.graph)
    tokens = find_tokens(gm.graph, sites)
    names = [input_name(n) for n in gm.graph.find_nodes(op="placeholder")]
    found = find_token_ids(gm.graph, tokens, sites)
    places = {place for places in found.values() for place in places}
    assert all(isinstance(place, TokenIds) for place in places)
    return {names[place.argument]: tuple(place[1:]) for place in places}


def attend(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def test_ids_of_packed_latents_are_found():
    tiny = small.flux()
    found = positions_of(tiny.model, **tiny.inputs)
    assert found == {"img_ids": (0, 0, 20)}


def test_numbers_of_the_whole_sequence_are_cut():
    def model(x, text, ids):
        table = (ids * torch.arange(1.0, 4.0)).sum(-1)[None, :, None]
        return attend(torch.cat([text, x], 1) + table)[:, 7:]

    found = positions_of(model, torch.randn(2, 60, 8), torch.randn(2, 7, 8), torch.randn(67, 3))
    assert found["ids"] == (0, 7, 67)


def test_coordinates_may_come_first():
    def model(x, coords):
        return attend(x + coords.cos().sum(1)[..., None]) + attend(x[:, :1]).mean()

    def with_text(x, coords, text):
        return model(x, coords) + attend(text).mean()

    args = torch.randn(2, 60, 8), torch.randn(2, 3, 60), torch.randn(2, 7, 8)
    assert positions_of(with_text, *args)["coords"] == (2, 0, 60)


def test_a_proved_grid_and_changing_sizes_ask_for_no_numbers():
    tiny = small.wan()
    assert positions_of(tiny.model, **tiny.inputs) == {}
    tiny = small.flux()
    assert positions_of(tiny.model, dynamic=True, **tiny.inputs) == {}


def test_each_site_has_the_numbers_of_its_own_tokens():
    def model(video, sound, ids, times, text):
        video = attend(video + ids.sum(-1)[None, :, None]) + attend(text).mean()
        return video, attend(sound + times[None, :, None])

    args = [torch.randn(2, 60, 8), torch.randn(2, 60, 8), torch.randn(60, 3), torch.randn(60)]
    gm = capture_one(model, *args, torch.randn(2, 7, 8))
    sites = find_sites(gm.graph)
    names = [input_name(n) for n in gm.graph.find_nodes(op="placeholder")]
    found = find_token_ids(gm.graph, find_tokens(gm.graph, sites), sites)
    assert [{names[p.argument] for p in found.get(s.node, ())} for s in sites] == [
        {"video", "ids"},
        set(),
        {"sound", "times"},
    ]
