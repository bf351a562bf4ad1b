"""The sub-block estimate is exact for constant cells and finds what one mean per block hides."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.routers import oracle, sol, subblock

from .scenes import SCENES, Scene, average_blocks, check_plan, make_inputs, weigh_tokens

operator = torch.ops.ditopt.subblock_plan_v1


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
    estimate = subblock.plan(q, k, scale, scene.blocks, density=0.6, key_bias=bias, cell=8)
    exact = oracle.plan(q, k, scale, scene.blocks, density=0.6, key_bias=bias)
    check_plan(estimate, scene.blocks)
    torch.testing.assert_close(estimate.recall, exact.recall, rtol=1e-4, atol=1e-5)


def test_cells_see_more_than_centroids():
    scene = Scene(tokens=256, video_tokens=256, block_q=32, block_k=32)
    q, k, _, scale = make_constant_cells(scene, 8)
    # Every second cell points the other way, so that block means vanish.
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(8).repeat(16)
    k = k * signs[:, None]
    mass = average_blocks(weigh_tokens(q, k, None, scale), 32, 32)
    kept = []
    for plan in (
        subblock.plan(q, k, scale, scene.blocks, density=0.4, cell=8),
        sol.plan(q, k, scale, scene.blocks, density=0.4),
    ):
        kept.append((mass * check_plan(plan, scene.blocks)).sum().item())
    assert kept[0] > 1.05 * kept[1]


def test_the_operator_returns_the_plan_and_passes_opcheck():
    scene = SCENES["bias"]
    q, k, bias, scale = make_inputs(scene)
    arguments = (q, k, bias, scale, 0.9, False, *scene.place, 8)
    expected = subblock.plan(q, k, scale, scene.blocks, quality=0.9, key_bias=bias, cell=8)
    for x, y in zip(operator(*arguments), expected.tensors, strict=True):
        assert torch.equal(x, y)
    torch.library.opcheck(operator.default, arguments)
