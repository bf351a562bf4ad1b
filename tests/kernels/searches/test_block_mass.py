"""The exact block mass equals plain arithmetic, tiled or not."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.searches.mass import blocks as block_mass
from dit_opt.kernels.searches.mass.blocks import measure_block_mass

from .scenes import SCENES, Scene, average_blocks, make_inputs, weigh_tokens


def check_against_arithmetic(q, k, bias, scale, block_q=32, block_k=16):
    mass = measure_block_mass(q, k, scale, block_q, block_k, bias)
    weights = weigh_tokens(q, k, bias, scale).nan_to_num()
    expected = average_blocks(weights, block_q, block_k).float()
    torch.testing.assert_close(mass, expected, rtol=5e-5, atol=1e-6)
    return mass


@pytest.mark.parametrize("tile", [None, 37 * 160], ids=["one tile", "tiles of 37 rows"])
@pytest.mark.parametrize("factor", [1.0, 8.0], ids=["bounded", "large scores"])
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_cpus_match_arithmetic(scene, factor, tile, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(block_mass, "SCORE_TILE", tile)
    q, k, bias, scale = make_inputs(scene)
    mass = check_against_arithmetic(q * factor, k, bias, scale)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]), rtol=0, atol=1e-5)


def test_queries_and_keys_may_differ_in_number_stride_and_precision():
    q, k, _, scale = make_inputs(Scene(tokens=90, heads=4, key_heads=2))
    q = q[:, :, :77].transpose(1, 2).contiguous().transpose(1, 2)
    check_against_arithmetic(q, k[..., :50, :], None, scale)
    check_against_arithmetic(q.bfloat16(), k.bfloat16(), None, scale)


def test_rows_without_keys_have_no_mass():
    q, k, _, scale = make_inputs(Scene(tokens=64, heads=2, key_heads=2))
    bias = torch.full((1, 2, 64), -torch.inf)
    bias[:, 1] = 0.0
    mass = check_against_arithmetic(q, k, bias, scale)
    assert not mass[:, 0].any() and mass[:, 1].any()


def test_inputs_that_do_not_fit_are_refused():
    q, k, _, scale = make_inputs(Scene(tokens=64))
    with pytest.raises(TypeError, match=r"not torch\.float32 and torch\.float64"):
        measure_block_mass(q, k.double(), scale, 32, 16)
    for arguments, named in [
        ((q, k[:, :2], scale, 32, 16), "Hk a divisor of H"),
        ((q, k[:, :, :0], scale, 32, 16), "is empty"),
        ((q, k, -1.0, 32, 16), "scale=-1.0"),
        ((q, k, scale, 32, 16, torch.zeros(1, 3, 63)), "key_bias must be float32"),
    ]:
        with pytest.raises(ValueError, match=named):
            measure_block_mass(*arguments)
