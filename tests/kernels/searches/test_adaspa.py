"""The exact search keeps the mass it promises, to the token; sampled rows stand for the others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.reference import expand_blocks
from dit_opt.kernels.plan.plan import Plan
from dit_opt.kernels.searches.adaspa import op as adaspa

from .scenes import SCENES, Scene, check_plan, make_inputs, video_rows, weigh_tokens

operator = torch.ops.ditopt.adaspa_plan_v2


def search(scene, q, k, bias, scale, target, by_density, row_step=1):
    return Plan(*operator(q, k, bias, scale, target, by_density, *scene.place, row_step))


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_the_promised_mass_is_kept(scene):
    q, k, bias, scale = make_inputs(scene)
    chosen = search(scene, q, k, bias, scale, 0.8, False)
    mask = check_plan(chosen, scene.blocks)
    kept = expand_blocks(mask, scene.tokens, scene.tokens, scene.block_q, scene.block_k)
    weights = weigh_tokens(q, k, bias, scale)
    share = (weights * kept).sum(-1)[:, :, video_rows(scene)].mean(-1)
    assert (share >= 0.8 - 1e-5).all()
    torch.testing.assert_close(chosen.recall.double(), share, rtol=1e-4, atol=1e-5)
    assert not mask.all()


def test_every_other_row_speaks_for_its_neighbour():
    scene = dataclasses.replace(SCENES["text after"], tokens=167)
    q, k, _, scale = make_inputs(scene)
    exact = search(scene, q, k, None, scale, 0.6, True)
    sampled = search(scene, q, k, None, scale, 0.6, True, 2)
    check_plan(sampled, scene.blocks)
    torch.testing.assert_close(sampled.recall, exact.recall, rtol=0.1, atol=0.0)
    # Pairs of equal queries leave nothing to chance.
    twins = q[:, :, ::2].repeat_interleave(2, 2)[:, :, :167]
    exact = search(scene, twins, k, None, scale, 0.9, False)
    sampled = search(scene, twins, k, None, scale, 0.9, False, 2)
    assert torch.equal(exact.indices[:, :, :4], sampled.indices[:, :, :4])
    with pytest.raises(ValueError, match="row_step=3 does not divide"):
        search(scene, q, k, None, scale, 0.6, True, 3)


def test_queries_of_another_length_are_refused():
    scene = Scene()
    q, k, _, scale = make_inputs(scene)
    with pytest.raises(ValueError, match=r"plans self-attention over 150 tokens, .* 149 keys"):
        search(scene, q, k[:, :, 1:], None, scale, 0.5, True)


def test_opcheck():
    scene = SCENES["bias"]
    q, k, bias, scale = make_inputs(scene)
    boost = torch.tensor([[1.0, 2.0, torch.inf]]).expand(2, 3)
    arguments = (q, k, bias, scale, 0.9, False, *scene.place, 2)
    torch.library.opcheck(operator.default, (*arguments, boost))
    torch.library.opcheck(operator.default, arguments, {"boost": boost})


def test_sampled_rows_stand_at_every_position_of_their_groups():
    rows = adaspa.draw_rows(4096, 16, torch.device("cpu"))
    assert len(rows) == 256 and torch.equal(rows // 16, torch.arange(256))
    assert (rows % 16).bincount(minlength=16).min() >= 15
    assert torch.equal(adaspa.draw_rows(33, 16, torch.device("cpu"))[-1:], torch.tensor([32]))
