"""What is pinned is all that the ops of a site look up."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels import token_order
from dit_opt.kernels.plan import plan
from dit_opt.kernels.searches import frame_tile
from dit_opt.kernels.searches.headwise import head_orders
from dit_opt.kernels.searches.rainfusion import sample, tables
from dit_opt.runtime.registry import live_bounds
from tests.trajectories import compiled, run_trajectory
from zoo.small import cogvideox, flux, hunyuan_video, wan

pytestmark = pytest.mark.usefixtures("eager")

CACHES = (
    token_order.build_cube_order,
    frame_tile.build_tiles,
    head_orders.build_orders,
    head_orders.list_orders,
    plan.lay_blocks,
    sample.draw_sample,
    tables.build_tables,
)


@pytest.mark.parametrize(
    ("router", "make"),
    [
        ("headwise", wan),
        ("headwise", flux),
        ("oracle", wan),
        ("rainfusion", wan),
        ("frame_tile", wan),
        ("adaspa", wan),
        ("adaspa", flux),
        # text stands in the sequence, so that the ordered region is not all of it
        ("adaspa", hunyuan_video),
        ("subblock", cogvideox),
        ("subblock", wan),
        ("sol", wan),
    ],
)
def test_a_call_builds_no_table_that_is_not_pinned(router, make):
    tiny = make()
    model = compiled(tiny.model, router=router, min_tokens=0, dense_steps=0, refresh_every=1)
    run_trajectory(model, tiny.inputs, [999.0])
    (bound,) = live_bounds()
    for cache in CACHES:
        cache.cache_clear()
    (sizes,) = bound.pin_sizes.values()
    pins = zip(bound.plan.pins, sizes, strict=True)
    pinned = [pin.make(of_pin, torch.device("cpu")) for pin, of_pin in pins]
    assert pinned and all(pinned)
    built = [cache.cache_info().misses for cache in CACHES]
    run_trajectory(model, tiny.inputs, [500.0])
    assert [cache.cache_info().misses for cache in CACHES] == built
