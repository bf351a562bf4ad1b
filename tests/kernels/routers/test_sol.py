"""Centroid scores: the threshold is the rule's, and targets turn them into mass."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.routers import sol

from .scenes import SCENES, Scene, check_plan, make_inputs

operator = torch.ops.ditopt.sol_plan_v1


@pytest.mark.parametrize("tau", [-9.0, 0.5, 1.0])
def test_tau_keeps_what_stands_out_of_its_row(tau):
    scene = Scene(tokens=160, video_tokens=160)
    q, k, _, scale = make_inputs(scene)
    plan = sol.plan(q, k, scale, scene.blocks, tau=tau)
    mask = check_plan(plan, scene.blocks)
    centroids = q.unflatten(2, (-1, 32)).mean(3), k.unflatten(2, (-1, 16)).mean(3)
    scores = centroids[0] @ centroids[1].mT * scale
    limit = scores.mean(-1, keepdim=True) + tau * scores.std(-1, correction=0, keepdim=True)
    assert torch.equal(mask, (scores > limit) | scene.blocks.always_kept)
    if tau < -3:
        torch.testing.assert_close(plan.recall, torch.ones(1, 3))


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_targets_are_met(scene):
    q, k, bias, scale = make_inputs(scene)
    plan = sol.plan(q, k, scale, scene.blocks, quality=0.8, key_bias=bias)
    check_plan(plan, scene.blocks)
    assert (plan.recall >= 0.8 - 1e-5).all()
    looser = sol.plan(q, k, scale, scene.blocks, quality=0.95, key_bias=bias)
    assert (looser.density >= plan.density).all()


def test_masked_blocks_do_not_move_the_threshold():
    scene = Scene(tokens=160, video_tokens=160)
    q, k, _, scale = make_inputs(scene)
    bias = torch.zeros(1, 1, 160)
    bias[..., 96:] = -torch.inf
    mask = check_plan(sol.plan(q, k, scale, scene.blocks, tau=0.5, key_bias=bias), scene.blocks)
    centroids = q.unflatten(2, (-1, 32)).mean(3), k[:, :, :96].unflatten(2, (-1, 16)).mean(3)
    scores = centroids[0] @ centroids[1].mT * scale
    limit = scores.mean(-1, keepdim=True) + 0.5 * scores.std(-1, correction=0, keepdim=True)
    assert torch.equal(mask[..., :6], (scores > limit) | scene.blocks.always_kept[:, :6])
    assert not (mask & ~scene.blocks.always_kept)[..., 6:].any()


@pytest.mark.parametrize("by", ["tau", "density"])
def test_the_operator_returns_the_plan_and_passes_opcheck(by):
    scene = SCENES["grouped heads, batch"]
    q, k, _, scale = make_inputs(scene)
    arguments = (q, k, None, scale, 0.7, by, *scene.place)
    expected = sol.plan(q, k, scale, scene.blocks, **{by: 0.7})
    for x, y in zip(operator(*arguments), expected.tensors, strict=True):
        assert torch.equal(x, y)
    if by == "tau":
        torch.library.opcheck(operator.default, arguments)


def test_a_missing_or_unknown_target_is_refused():
    scene = Scene()
    q, k, _, scale = make_inputs(scene)
    with pytest.raises(ValueError, match="give exactly one"):
        sol.plan(q, k, scale, scene.blocks, tau=1.0, density=0.5)
    with pytest.raises(ValueError, match="named 'topk'"):
        operator(q, k, None, scale, 0.5, "topk", *scene.place)
