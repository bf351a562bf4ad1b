"""What plans keep, end to end, on attention whose mass is known: every answer has an oracle.

The router sees one row of tokens, in which the regions of the model are whole blocks of any size up
to `REGION_TOKENS`; nothing is compiled.
"""

from __future__ import annotations

import pytest
import torch

import dit_opt
from tests.trajectories import compiled
from zoo.hand_written import (
    HEAD_DIM,
    HEADS,
    REGION_TOKENS,
    REGIONS,
    SHARES,
    RegionAttention,
    attend,
    draw_mass,
    keep_heaviest,
    make_latents,
)

pytestmark = pytest.mark.usefixtures("eager")

ROUTERS = ["headwise", "oracle", "subblock", "sol", "adaspa"]
ASKED = {"grid": (1, 1, REGIONS * REGION_TOKENS), "min_tokens": 0, "dense_steps": 0}
# Each region is a frame.
FRAMES = {"grid": (REGIONS, 8, REGION_TOKENS // 8)}
EVERYTHING = torch.ones(HEADS, REGIONS, REGIONS, dtype=torch.bool)
# A quality that the own region and one more reach, but no fewer blocks.
TWO_REGIONS = 0.745


class Sampler:
    """Calls a compiled model at falling timesteps, and checks each answer against the oracle."""

    def __init__(self, **options):
        self.model = RegionAttention()
        self.compiled = compiled(self.model, **{**ASKED, **options})
        self.timestep = 1000.0

    def step(self, mass):
        """Latents of that mass, and the answer of the next step."""
        self.timestep -= 50
        latents = make_latents(mass)
        return latents, self.compiled(latents, torch.tensor([self.timestep]))

    def check(self, mass, kept):
        """The next step, on latents of that mass, must see what is kept of them and no more."""
        latents, out = self.step(mass)
        torch.testing.assert_close(out, attend(latents, kept), rtol=1e-4, atol=1e-5)

    @property
    def layer(self):
        (graph,) = dit_opt.report(self.model).graphs
        (layer,) = graph.layers
        return layer


def join_heads(first, second):
    """What each head has of its own."""
    return torch.stack([first[0], second[1]])


def test_the_oracle_is_the_model_where_everything_is_kept():
    latents = make_latents(draw_mass(1))
    dense = RegionAttention()(latents, torch.tensor([500.0]))
    torch.testing.assert_close(attend(latents, EVERYTHING), dense, rtol=1e-4, atol=1e-5)
    fewer = attend(latents, keep_heaviest(draw_mass(1), 4))
    assert (fewer - dense).abs().max() > 0.01


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    ("asked", "regions"),
    [
        ({"density": 2 / REGIONS}, 2),
        ({"density": 3 / REGIONS}, 3),
        ({"density": 5 / REGIONS}, 5),
        ({"quality": TWO_REGIONS}, 2),
        ({"quality": 0.87}, 3),
        ({"quality": 0.9999}, 5),
    ],
    ids=str,
)
def test_a_plan_keeps_the_blocks_of_most_mass_and_no_others(router, asked, regions):
    sampler, mass = Sampler(router=router, **asked), draw_mass(1)
    sampler.check(mass, keep_heaviest(mass, regions))
    assert sampler.layer.density == pytest.approx(regions / REGIONS)
    assert sampler.layer.recall == pytest.approx(sum(SHARES[:regions]), abs=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_tail_stands_for_all_that_is_dropped_where_keys_are_equal(router):
    sampler, mass = Sampler(router=router, density=2 / REGIONS, tail="centroid"), draw_mass(1)
    sampler.check(mass, EVERYTHING)
    assert sampler.layer.density == pytest.approx(2 / REGIONS)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_plan_serves_until_the_next_search_and_no_longer(router):
    sampler = Sampler(router=router, density=2 / REGIONS, refresh_every=2)
    first, second = draw_mass(1), draw_mass(2)
    sampler.check(first, keep_heaviest(first, 2))
    sampler.check(second, keep_heaviest(first, 2))
    sampler.check(second, keep_heaviest(second, 2))
    assert (sampler.layer.calls, sampler.layer.searches) == (3, 2)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_caught_head_runs_dense_and_is_searched_anew_with_a_larger_budget(router):
    """Twice as much of the mass must be kept after each catch; after the third one, all of it."""
    sampler = Sampler(router=router, quality=TWO_REGIONS, verify_every=1, refresh_every=1000)
    steady, moving = draw_mass(1), [draw_mass(seed) for seed in (1, 2, 3, 4)]
    two = keep_heaviest(steady, 2)
    sampler.check(steady, two)
    for mass, regions in zip(moving[1:], (3, 4, REGIONS)):
        mass = join_heads(steady, mass)
        # the plan of the step before serves the second head no longer
        sampler.check(mass, join_heads(two, EVERYTHING))
        sampler.check(mass, join_heads(two, keep_heaviest(mass, regions)))
        # nothing has changed, and nothing is caught
        sampler.check(mass, join_heads(two, keep_heaviest(mass, regions)))
    layer = sampler.layer
    assert (layer.guard.caught, layer.guard.dense_heads) == (3, 1)
    assert (layer.calls, layer.searches, layer.guard.checks) == (10, 4, 10)
    kept = 2 + 3 * REGIONS + 2 * (3 + 4 + REGIONS)
    assert layer.density == pytest.approx((2 * 10 + kept) / (2 * 10 * REGIONS))


@pytest.mark.parametrize("router", ROUTERS)
def test_without_checks_a_head_keeps_its_wrong_plan(router):
    sampler = Sampler(router=router, quality=TWO_REGIONS, refresh_every=1000)
    first, second = draw_mass(1), draw_mass(2)
    sampler.check(first, keep_heaviest(first, 2))
    for _ in range(2):
        sampler.check(second, keep_heaviest(first, 2))
    assert sampler.layer.guard is None


def share(weights):
    """Mass in proportion to weights, the same for all heads."""
    return (weights / weights.sum(-1, keepdim=True)).expand(HEADS, -1, -1)


OWN = torch.eye(REGIONS)
NEIGHBOURS = (torch.arange(REGIONS) - torch.arange(REGIONS)[:, None]).abs() <= 1


@pytest.mark.parametrize(
    ("mass", "density", "heads"),
    [
        (share(OWN), 1 / REGIONS, {"spatial": 2}),
        (share(NEIGHBOURS), (3 * REGIONS - 2) / REGIONS**2, {"spatial": 2}),
        (
            join_heads(share(OWN), share(torch.ones_like(OWN))),
            (1 / REGIONS + 1) / 2,
            {"spatial": 1, "dense": 1},
        ),
    ],
    ids=["own frame", "neighbours", "each its own"],
)
def test_rainfusion_picks_the_sparsest_pattern_that_holds_the_mass(mass, density, heads):
    sampler = Sampler(router="rainfusion", quality=0.99, **FRAMES)
    sampler.check(mass, EVERYTHING)
    layer = sampler.layer
    assert (layer.density, layer.recall) == (pytest.approx(density), pytest.approx(1))
    assert layer.heads == heads


def test_rainfusion_lets_a_caught_head_drop_half_as_much():
    before, moved = share(0.6 * OWN + 0.4 / 7 * (1 - OWN)), share(0.2 * OWN + 0.8 / 7 * (1 - OWN))
    options = {"router": "rainfusion", "refresh_every": 1000, **FRAMES}
    sampler = Sampler(quality=0.55, verify_every=1, **options)
    sampler.check(before, OWN.bool().expand(HEADS, -1, -1))
    sampler.check(moved, EVERYTHING)
    _, out = sampler.step(before)
    larger = Sampler(quality=1 - (1 - 0.55) / 2, **options)
    torch.testing.assert_close(out, larger.step(before)[1])
    assert larger.layer.density > 1.1 / REGIONS
    assert sampler.layer.density_by_type == larger.layer.density_by_type


def lay_tiles(references):
    """Each frame sees itself and the frames of reference."""
    tiles = OWN.bool()
    tiles[:, references] = True
    return tiles.expand(HEADS, -1, -1)


def test_frame_tiles_are_the_own_frame_and_references_spread_evenly():
    sampler, tiles = Sampler(router="frame_tile", density=3 / REGIONS, **FRAMES), lay_tiles([2, 6])
    sampler.check(draw_mass(1), tiles)
    assert sampler.layer.density == pytest.approx(float(tiles.float().mean()))


def test_frame_tiles_that_were_caught_three_times_are_dense_from_then_on():
    """In steps that search, and in those that reuse what they found."""
    options = {"router": "frame_tile", "density": 3 / REGIONS, "refresh_every": 1000, **FRAMES}
    sampler = Sampler(verify_every=1, **options)
    served, other = share(OWN), share(OWN.roll(1, 1))
    for _ in range(3):
        sampler.check(served, EVERYTHING)
        # no tile holds the mass of six frames of eight
        sampler.check(other, EVERYTHING)
    assert sampler.layer.guard.caught == 3 * HEADS
    before = sampler.layer
    for mass in (served, other, other):
        sampler.check(mass, EVERYTHING)
    after = sampler.layer
    assert (after.guard.caught, after.guard.dense_heads) == (3 * HEADS, HEADS)
    assert after.searches == before.searches + 1
    assert after.density * after.calls - before.density * before.calls == pytest.approx(3)


def measure_error(mass, kept):
    """Relative L2 error of what is kept, the mean over heads."""
    latents = make_latents(mass)
    out, dense = (
        attend(latents, k).unflatten(-1, (HEADS, HEAD_DIM)).transpose(0, 2).flatten(1)
        for k in (kept, EVERYTHING)
    )
    return float(((out - dense).norm(dim=1) / dense.norm(dim=1)).mean())


@pytest.mark.parametrize("router", ROUTERS)
def test_the_guard_reports_what_is_kept_and_how_far_off_it_is(router):
    sampler, mass = Sampler(router=router, quality=TWO_REGIONS, verify_every=1), draw_mass(1)
    two = keep_heaviest(mass, 2)
    for _ in range(3):
        sampler.check(mass, two)
    guard = sampler.layer.guard
    error = measure_error(mass, two)
    assert (guard.checks, guard.caught, guard.dense_heads) == (3, 0, 0)
    assert guard.kept == pytest.approx(0.75, abs=1e-4)
    assert guard.error == pytest.approx(error, rel=1e-3)
    text = str(dit_opt.report(sampler.model))
    assert f"kept 0.750, error {error:.3f}, caught 0" in text


@pytest.mark.parametrize("router", ROUTERS)
def test_differences_to_dense_are_true_and_say_which_steps_to_keep_dense(router):
    sampler = Sampler(router=router, density=2 / REGIONS, verify=True)
    spread, peaked = draw_mass(1), torch.eye(REGIONS).expand(HEADS, -1, -1)
    two = keep_heaviest(spread, 2)
    sampler.check(spread, two)
    sampler.check(spread, two)
    sampler.check(peaked, two)
    error = measure_error(spread, two)
    assert error > 0.1
    assert sampler.layer.differences == pytest.approx(
        {0: error, 1: error, 2: 0}, rel=1e-3, abs=1e-5
    )
    text = str(dit_opt.report(sampler.model))
    assert "More than 10% from dense attention on average; consider dense_steps=2." in text


def test_no_step_is_named_where_everything_that_matters_is_kept():
    sampler, mass = Sampler(router="subblock", density=5 / REGIONS, verify=True), draw_mass(1)
    for _ in range(2):
        sampler.check(mass, EVERYTHING)
    assert max(sampler.layer.differences.values()) < 1e-5
    assert "No step and no layer differs" in str(dit_opt.report(sampler.model))
