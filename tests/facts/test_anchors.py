from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_opt.facts.anchors import find_layer_anchor, find_model_anchor
from dit_opt.facts.sites import find_sites
from tests.graphs import capture_one, capture_tiny
from zoo import small


@pytest.mark.parametrize("make", small.ALL, ids=lambda make: make.__name__)
def test_each_site_of_a_model_has_an_anchor_of_its_own(make):
    tiny, gm = capture_tiny(make)
    sites = find_sites(gm.graph)
    anchors = [find_layer_anchor(s, gm.graph) for s in sites]
    assert len(set(anchors)) == len(sites)
    for site, anchor in zip(sites, anchors, strict=True):
        own = {tuple(p.shape) for p in tiny.model.get_submodule(site.module).parameters()}
        assert tuple(anchor.meta["example_value"].shape) in own
        assert site.module.split(".")[-1] in anchor.name
    assert isinstance(find_model_anchor(gm.graph).meta["example_value"], nn.Parameter)


def test_the_sites_of_a_lone_block_have_anchors():
    block = small.wan().model.blocks[1]
    rotary = tuple(torch.randn(1, 60, 1, 24) for _ in range(2))
    inputs = (torch.randn(1, 60, 48), torch.randn(1, 7, 48), torch.randn(1, 6, 48), rotary)
    gm = capture_one(block, *inputs)
    sites = find_sites(gm.graph)
    anchors = [find_layer_anchor(s, gm.graph) for s in sites]
    assert ["attn1" in anchors[0].name, "attn2" in anchors[1].name] == [True, True]


def attend(x):
    return nn.functional.scaled_dot_product_attention(x, x, x)


def test_anchor_outside_of_modules_is_the_nearest_parameter():
    near, far = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    gm = capture_one(lambda x: attend(near(far(x))), torch.randn(1, 2, 8, 4))
    (site,) = find_sites(gm.graph)
    assert "near" in find_layer_anchor(site, gm.graph).name


def test_no_parameters_no_anchor():
    gm = capture_one(attend, torch.randn(1, 2, 8, 4))
    (site,) = find_sites(gm.graph)
    assert find_layer_anchor(site, gm.graph) is None and find_model_anchor(gm.graph) is None
