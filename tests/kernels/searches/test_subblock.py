"""The estimate by cells is exact for constant cells and finds what one mean per block hides."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.plan.plan import Plan

from .scenes import (
    SCENES,
    Scene,
    average_blocks,
    check_plan,
    make_inputs,
    plan_exactly,
    weigh_tokens,
)

operator = torch.ops.ditopt.subblock_plan_v2


def search(scene, q, k, bias, scale, target, by_density, *cells):
    cells = cells or (scene.block_q, scene.block_k)
    return Plan(*operator(q, k, bias, scale, target, by_density, *scene.place, *cells))


def make_constant_cells(scene, cell):
    """Keys that are equal within each cell, and queries that are equal within each block."""
    q, k, bias, scale = make_inputs(scene)
    q = q[:, :, :: scene.block_q].repeat_interleave(scene.block_q, 2)[:, :, : scene.tokens]
    k = k[:, :, ::cell].repeat_interleave(cell, 2)[:, :, : scene.tokens]
    return q, k, bias, scale


@pytest.mark.parametrize("name", ["video only", "text after", "grouped heads, batch", "bias"])
def test_the_estimate_is_exact_where_cells_are_constant(name):
    scene = SCENES[name]
    q, k, bias, scale = make_constant_cells(scene, 8)
    estimate = search(scene, q, k, bias, scale, 0.6, True, 8, 8)
    exact = plan_exactly(scene, q, k, bias, scale, 0.6, True)
    check_plan(estimate, scene.blocks)
    torch.testing.assert_close(estimate.recall, exact.recall, rtol=1e-4, atol=1e-5)


def test_cells_see_more_than_one_mean_per_block():
    scene = Scene(tokens=256, video_tokens=256, block_q=32, block_k=32)
    q, k, _, scale = make_constant_cells(scene, 8)
    # Every second cell points the other way, so that block means vanish.
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(8).repeat(16)
    k = k * signs[:, None]
    mass = average_blocks(weigh_tokens(q, k, None, scale), 32, 32)
    kept = []
    for cells in ((8, 8), (32, 32)):
        plan = search(scene, q, k, None, scale, 0.4, True, *cells)
        kept.append((mass * check_plan(plan, scene.blocks)).sum().item())
    assert kept[0] > 1.05 * kept[1]


@pytest.mark.parametrize("cells", [(8, 8), (32, 16)], ids=str)
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_targets_are_met(scene, cells):
    q, k, bias, scale = make_inputs(scene)
    plan = search(scene, q, k, bias, scale, 0.8, False, *cells)
    check_plan(plan, scene.blocks)
    assert (plan.recall >= 0.8 - 1e-5).all()
    looser = search(scene, q, k, bias, scale, 0.95, False, *cells)
    assert (looser.density >= plan.density).all()


def test_masked_keys_take_no_blocks():
    scene = Scene(tokens=160, video_tokens=160)
    q, k, _, scale = make_inputs(scene)
    bias = torch.zeros(1, 1, 160)
    bias[..., 96:] = -torch.inf
    masked = check_plan(search(scene, q, k, bias, scale, 0.95, False), scene.blocks)
    assert not (masked & ~scene.blocks.always_kept)[..., 6:].any()
    other = torch.cat([k[:, :, :96], 9 * k[:, :, 96:]], 2)
    again = check_plan(search(scene, q, other, bias, scale, 0.95, False), scene.blocks)
    assert torch.equal(again, masked)


def test_opcheck():
    scene = SCENES["bias"]
    q, k, bias, scale = make_inputs(scene)
    boost = torch.tensor([[1.0, 2.0, torch.inf]]).expand(2, 3)
    arguments = (q, k, bias, scale, 0.9, False, *scene.place, 8, 8)
    torch.library.opcheck(operator.default, arguments, {"boost": boost})
