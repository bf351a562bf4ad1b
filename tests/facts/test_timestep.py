from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_opt.facts.timestep import find_timestep
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


def test_timestep_for_each_token():
    tiny = small.wan()
    inputs = {**tiny.inputs, "timestep": torch.full((1, 60), 500)}
    assert names(find_timestep(capture_one(tiny.model, **inputs).graph)) == ["timestep"]


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


def test_a_lone_block_has_no_timestep():
    block = small.wan().model.blocks[1]
    rotary = tuple(torch.randn(1, 60, 1, 24) for _ in range(2))
    inputs = (torch.randn(1, 60, 48), torch.randn(1, 7, 48), torch.randn(1, 6, 48), rotary)
    assert find_timestep(capture_one(block, *inputs).graph) is None
