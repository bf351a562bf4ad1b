from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_opt.facts.provenance import find_timestep, layer_anchor, model_anchor
from dit_opt.facts.sites import find_sites
from tests.graphs import capture_one, capture_tiny
from zoo import small


def names(timestep) -> list[str]:
    return [
        n.name.removeprefix("l_kwargs_").strip("_").removeprefix("l_") for n in timestep.candidates
    ]


EXPECTED = {
    "wan": ["timestep"],
    "hunyuan_video": ["timestep", "guidance"],
    "cogvideox_rope": ["timestep"],
    "ltx": ["timestep"],
    "flux": ["timestep", "guidance"],
    "sd3": ["timestep"],
    "dit": ["timestep"],
}


@pytest.mark.parametrize("make", small.ALL, ids=lambda make: make.__name__)
def test_models(make):
    tiny, gm = capture_tiny(make)
    timestep = find_timestep(gm.graph)
    assert timestep is not None
    assert names(timestep) == EXPECTED[tiny.name]
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert placeholders[timestep.index] is timestep.placeholder
    assert not timestep.per_token

    sites = find_sites(gm.graph)
    anchors = [layer_anchor(s, gm.graph) for s in sites]
    assert len(set(anchors)) == len(sites)
    for site, anchor in zip(sites, anchors, strict=True):
        own = {tuple(p.shape) for p in tiny.model.get_submodule(site.module).parameters()}
        assert tuple(anchor.meta["example_value"].shape) in own
        assert site.module.split(".")[-1] in anchor.name
    assert isinstance(model_anchor(gm.graph).meta["example_value"], nn.Parameter)


def test_timestep_for_each_token():
    tiny = small.wan()
    inputs = {**tiny.inputs, "timestep": torch.full((1, 60), 500)}
    timestep = find_timestep(capture_one(tiny.model, **inputs).graph)
    assert names(timestep) == ["timestep"] and timestep.per_token


def embed(t: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    angle = t[:, None] * torch.exp(-torch.arange(4.0))[None]
    return layer(torch.cat([angle.cos(), angle.sin()], -1))


def test_names_do_not_matter():
    layer = nn.Linear(8, 8)
    inputs = torch.ones(2), torch.zeros(2)

    def both(guidance, timestep):
        return embed(timestep * guidance, layer)

    def guidance_only(guidance, timestep):
        return embed(guidance, layer) + timestep[:, None]

    assert len(find_timestep(capture_one(both, *inputs).graph).candidates) == 2
    found = find_timestep(capture_one(guidance_only, *inputs).graph)
    assert [n.name for n in found.candidates] == ["l_guidance_"]


def test_sizes_of_the_latents_are_no_source():
    layer = nn.Linear(8, 8)

    def forward(x, t):
        return x + embed(t.expand(x.shape[0]).to(x.dtype), layer)

    gm = capture_one(forward, torch.randn(3, 8), torch.ones(1), dynamic=True)
    assert [n.name for n in find_timestep(gm.graph).candidates] == ["l_t_"]


def test_rotary_tables_are_no_timestep():
    def forward(x, ids):
        angle = ids[:, None].float() * torch.arange(4.0)[None]
        table = torch.cat([angle.cos(), angle.sin()], -1)
        return x * table

    assert find_timestep(capture_one(forward, torch.randn(3, 8), torch.arange(3)).graph) is None


def test_position_embeddings_are_no_timestep():
    layer = nn.Linear(8, 8)
    gm = capture_one(lambda x: x + embed(torch.arange(3.0), layer), torch.randn(3, 8))
    assert find_timestep(gm.graph) is None


def test_a_table_of_the_model_is_no_timestep():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.arange(3.0))
            self.loose = torch.arange(3.0)
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x + embed(self.positions + self.loose, self.layer)

    assert find_timestep(capture_one(Model(), torch.randn(3, 8)).graph) is None


def lone_block():
    block = small.wan().model.blocks[1]
    rotary = tuple(torch.randn(1, 60, 1, 24) for _ in range(2))
    inputs = (torch.randn(1, 60, 48), torch.randn(1, 7, 48), torch.randn(1, 6, 48), rotary)
    return capture_one(block, *inputs)


def test_a_lone_block_has_no_timestep_but_anchors():
    gm = lone_block()
    assert find_timestep(gm.graph) is None
    sites = find_sites(gm.graph)
    anchors = [layer_anchor(s, gm.graph) for s in sites]
    assert ["attn1" in anchors[0].name, "attn2" in anchors[1].name] == [True, True]


def attend(x):
    return nn.functional.scaled_dot_product_attention(x, x, x)


def test_anchor_outside_of_modules_is_the_nearest_parameter():
    near, far = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    gm = capture_one(lambda x: attend(near(far(x))), torch.randn(1, 2, 8, 4))
    (site,) = find_sites(gm.graph)
    assert "near" in layer_anchor(site, gm.graph).name


def test_no_parameters_no_anchor():
    gm = capture_one(attend, torch.randn(1, 2, 8, 4))
    (site,) = find_sites(gm.graph)
    assert layer_anchor(site, gm.graph) is None and model_anchor(gm.graph) is None
