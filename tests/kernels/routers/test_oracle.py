"""No other lists of the same size keep more of the exact mass than the oracle's."""

from __future__ import annotations

import pytest

from dit_opt.kernels.routers import oracle, sol, subblock

from .scenes import SCENES, Scene, average_blocks, check_plan, make_inputs, weigh_tokens


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_no_other_router_keeps_more_at_the_same_density(scene):
    q, k, bias, scale = make_inputs(scene)
    mass = average_blocks(weigh_tokens(q, k, bias, scale), scene.block_q, scene.block_k)
    best = oracle.plan(q, k, scale, scene.blocks, density=0.7, key_bias=bias)
    # What each block adds to the mean over all queries.
    gain = mass * (scene.blocks.query_sizes / scene.tokens)[:, None]
    mask = check_plan(best, scene.blocks)
    for other in (sol, subblock):
        plan = other.plan(q, k, scale, scene.blocks, density=0.7, key_bias=bias)
        kept = (gain * check_plan(plan, scene.blocks)).sum((1, 2, 3))
        # One more block may have had room in the other's budget.
        room = gain.masked_fill(mask, 0.0).amax((1, 2, 3))
        assert (kept <= (gain * mask).sum((1, 2, 3)) + room).all()


def test_queries_of_another_length_are_refused():
    q, k, _, scale = make_inputs(Scene())
    with pytest.raises(ValueError, match="149 queries and 150 keys"):
        oracle.plan(q[:, :, 1:], k, scale, Scene().blocks, density=0.5)
