"""The exact search keeps the mass it promises, to the token, and remembers its row sums."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.reference import expand_blocks
from dit_opt.kernels.routers import adaspa, oracle

from .scenes import SCENES, Scene, check_plan, make_inputs, video_rows, weigh_tokens

operator = torch.ops.ditopt.adaspa_plan_v1


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_the_promised_mass_is_kept(scene):
    q, k, bias, scale = make_inputs(scene)
    chosen, lse = adaspa.plan(q, k, scale, scene.blocks, quality=0.8, key_bias=bias)
    mask = check_plan(chosen, scene.blocks)
    kept = expand_blocks(mask, scene.tokens, scene.tokens, scene.block_q, scene.block_k)
    weights = weigh_tokens(q, k, bias, scale)
    share = (weights * kept).sum(-1)[:, :, video_rows(scene)].mean(-1)
    assert (share >= 0.8 - 1e-5).all()
    torch.testing.assert_close(chosen.recall.double(), share, rtol=1e-4, atol=1e-5)
    assert not mask.all()
    # Searching again with the sums of the first search finds the same.
    again, found = adaspa.plan(q, k, scale, scene.blocks, quality=0.8, key_bias=bias, lse=lse)
    assert torch.equal(again.indices, chosen.indices)
    torch.testing.assert_close(found, lse, rtol=1e-5, atol=1e-5)


def test_peaked_heads_pay_for_diffuse_ones():
    scene = Scene(tokens=256, video_tokens=256, peaks=(0.2, 3.0))
    q, k, _, scale = make_inputs(scene)
    plans = {
        spread: adaspa.plan(q, k, scale, scene.blocks, density=0.4, spread=spread)[0]
        for spread in ("need", "even", "equal")
    }
    need, even, equal = plans.values()
    assert even.density[0, 0] > even.density[0, 1] < even.density[0, 2]
    assert even.recall.min() > equal.recall.min()
    assert need.recall.mean() >= even.recall.mean()
    torch.testing.assert_close(even.density.mean(), equal.density.mean(), rtol=0.05, atol=0)


def test_an_aged_sum_still_ranks_rows_by_their_shares():
    scene = Scene()
    q, k, _, scale = make_inputs(scene)
    _, lse = adaspa.plan(q, k, scale, scene.blocks, quality=0.8)
    aged, found = adaspa.plan(q * 1.2, k, scale, scene.blocks, quality=0.8, lse=lse)
    fresh = oracle.plan(q * 1.2, k, scale, scene.blocks, quality=0.8)
    check_plan(aged, scene.blocks)
    torch.testing.assert_close(aged.density, fresh.density, rtol=0.1, atol=0.02)
    assert not torch.allclose(found, lse, atol=1e-3)


def test_every_other_row_speaks_for_its_neighbour():
    scene = dataclasses.replace(SCENES["text after"], tokens=167)
    q, k, _, scale = make_inputs(scene)
    exact, _ = adaspa.plan(q, k, scale, scene.blocks, density=0.6)
    sampled, lse = adaspa.plan(q, k, scale, scene.blocks, density=0.6, row_step=2)
    assert lse.shape == (1, 3, 84)
    check_plan(sampled, scene.blocks)
    torch.testing.assert_close(sampled.recall, exact.recall, rtol=0.1, atol=0.0)
    # Pairs of equal queries leave nothing to chance.
    twins = q[:, :, ::2].repeat_interleave(2, 2)[:, :, :167]
    exact, _ = adaspa.plan(twins, k, scale, scene.blocks, quality=0.9)
    sampled, _ = adaspa.plan(twins, k, scale, scene.blocks, quality=0.9, row_step=2)
    assert torch.equal(exact.indices[:, :, :4], sampled.indices[:, :, :4])
    with pytest.raises(ValueError, match="row_step=3 does not divide"):
        adaspa.plan(q, k, scale, scene.blocks, density=0.6, row_step=3)


def test_the_operator_returns_the_plan():
    scene = SCENES["bias"]
    q, k, bias, scale = make_inputs(scene)
    found = operator(q, k, bias, None, scale, 0.6, True, *scene.place)
    expected, lse = adaspa.plan(q, k, scale, scene.blocks, density=0.6, key_bias=bias)
    for x, y in zip(found, (*expected.tensors, lse), strict=True):
        assert torch.equal(x, y)


def test_opcheck():
    scene = Scene(tokens=75, video_tokens=75, batch=2)
    q, k, _, scale = make_inputs(scene)
    lse = torch.zeros(2, 3, 38)
    torch.library.opcheck(
        operator.default, (q, k, None, lse, scale, 0.9, False, *scene.place, 2, "even", 4)
    )


def test_sampled_rows_stand_at_every_place_of_their_groups():
    rows = adaspa._draw_rows(4096, 16, torch.device("cpu"))
    assert len(rows) == 256 and torch.equal(rows // 16, torch.arange(256))
    assert (rows % 16).bincount(minlength=16).min() >= 15
    assert torch.equal(adaspa._draw_rows(33, 16, torch.device("cpu"))[-1:], torch.tensor([32]))
