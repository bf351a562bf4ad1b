"""The exact block mass equals plain arithmetic, tiled or not, with fresh or old row sums."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.routers import block_mass
from dit_opt.kernels.routers.block_mass import measure_block_mass, measure_plainly

from .scenes import SCENES, Scene, average_blocks, make_inputs, weigh_tokens

operator = torch.ops.ditopt.block_mass_v1


def check_against_reference(q, k, bias, lse, scale, block_q=32, block_k=16):
    arguments = (q, k, bias, lse, scale, block_q, block_k)
    mass, found = operator(*arguments)
    expected, expected_lse = measure_plainly(*arguments)
    torch.testing.assert_close(mass, expected, rtol=5e-5, atol=1e-6)
    torch.testing.assert_close(found, expected_lse, rtol=1e-5, atol=1e-5)
    return mass, found


def test_the_reference_is_the_mean_of_softmax_rows():
    q, k, bias, scale = make_inputs(SCENES["bias"])
    mass, lse = measure_plainly(q, k, bias, None, scale, 32, 16)
    expected = average_blocks(weigh_tokens(q, k, bias, scale), 32, 16)
    torch.testing.assert_close(mass, expected.float(), rtol=1e-6, atol=1e-7)
    again, _ = measure_plainly(q, k, bias, lse, scale, 32, 16)
    torch.testing.assert_close(again, mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile", [None, 37 * 160], ids=["one tile", "tiles of 37 rows"])
@pytest.mark.parametrize("factor", [1.0, 8.0], ids=["bounded", "large scores"])
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_processors_match_the_reference(scene, factor, tile, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(block_mass, "SCORE_TILE", tile)
    q, k, bias, scale = make_inputs(scene)
    mass, lse = check_against_reference(q * factor, k, bias, None, scale)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]), rtol=0, atol=1e-5)
    # The cached sums of a step before, when queries were a little shorter.
    check_against_reference(q * factor * 1.1, k, bias, lse, scale)


def test_queries_and_keys_may_differ_in_number_stride_and_precision():
    q, k, _, scale = make_inputs(Scene(tokens=90, heads=4, key_heads=2))
    q = q[:, :, :77].transpose(1, 2).contiguous().transpose(1, 2)
    check_against_reference(q, k[..., :50, :], None, None, scale)
    check_against_reference(q.bfloat16(), k.bfloat16(), None, None, scale)


def test_rows_without_keys_have_no_mass_and_come_back_with_their_keys():
    q, k, _, scale = make_inputs(Scene(tokens=64, heads=2, key_heads=2))
    bias = torch.full((1, 2, 64), -torch.inf)
    bias[:, 1] = 0.0
    mass, lse = check_against_reference(q, k, bias, None, scale)
    assert not mass[:, 0].any() and (lse[:, 0] == -torch.inf).all()
    check_against_reference(q, k, None, lse, scale)


def test_a_hopelessly_old_sum_stays_finite_and_heals():
    q, k, _, scale = make_inputs(Scene(tokens=64))
    lse = torch.full((1, 3, 64), -500.0)
    mass, found = measure_block_mass(q, k, scale, 32, 16, lse=lse)
    assert mass.isfinite().all() and found.isfinite().all() and (found > lse).all()


def test_opcheck():
    q, k, bias, scale = make_inputs(SCENES["bias"])
    lse = torch.zeros(q.shape[:3])
    torch.library.opcheck(operator.default, (q, k, bias, lse, scale, 32, 16))


def test_a_gpu_kernel_is_registered():
    name = "ditopt::block_mass_v1"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_inputs_that_do_not_fit_are_refused():
    q, k, _, scale = make_inputs(Scene(tokens=64))
    with pytest.raises(TypeError, match=r"not torch\.float32 and torch\.float64"):
        measure_block_mass(q, k.double(), scale, 32, 16)
    for arguments, named in [
        ((q, k[:, :2], scale, 32, 16), "Hk a divisor of H"),
        ((q, k[:, :, :0], scale, 32, 16), "is empty"),
        ((q, k, -1.0, 32, 16), "scale=-1.0"),
        ((q, k, scale, 32, 16, torch.zeros(1, 3, 63)), "key_bias must be float32"),
        ((q, k, scale, 32, 16, None, torch.zeros(1, 3, 32)), "hand back what an earlier search"),
    ]:
        with pytest.raises(ValueError, match=named):
            measure_block_mass(*arguments)
