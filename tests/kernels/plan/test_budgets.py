"""Budgets are as small as their target allows, go where the mass is, and end on whole blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dit_opt.kernels.cpp.build import load_library
from dit_opt.kernels.plan import budgets
from dit_opt.kernels.plan.budgets import allot_blocks, rate_recall
from dit_opt.kernels.plan.plan import Plan
from tests.kernels.searches.scenes import (
    SCENES,
    Scene,
    average_blocks,
    check_plan,
    make_inputs,
    plan_exactly,
    weigh_tokens,
)


def draw_mass(scene: Scene, seed: int = 0) -> torch.Tensor:
    """Random rows that sum to 1; every head more peaked than the one before."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = scene.blocks.always_kept.shape
    mass = torch.rand(scene.batch, scene.heads, rows, columns, generator=generator)
    mass = mass.pow(torch.arange(1, scene.heads + 1)[:, None, None] * 3.0)
    return mass / mass.sum(-1, keepdim=True)


def allot(mass, blocks, quality=None, density=None, **options):
    target, by_density = (quality, False) if density is None else (density, True)
    plan = allot_blocks(mass, blocks, target, by_density, **options)
    return plan, check_plan(plan, blocks)


def keep_mass(mass, mask, blocks):
    """Kept mass of each head in float64 over the rows that are not dense by rule, [B, H]."""
    free = ~blocks.always_kept.all(-1)
    weights = (blocks.query_sizes * free / (blocks.query_sizes * free).sum()).double()
    return ((mass.double() * mask).sum(-1) * weights).sum(-1), weights


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    quality=st.floats(0.2, 0.99),
    scene=st.sampled_from(list(SCENES.values())),
)
# a ragged block holds more mass per token than a full one can
@example(seed=415, quality=0.25, scene=SCENES["video only"])
def test_quality_is_reached_and_no_kept_block_could_go(seed, quality, scene):
    mass, blocks = draw_mass(scene, seed), scene.blocks
    plan, mask = allot(mass, blocks, quality=quality, spread="need")
    kept, weights = keep_mass(mass, mask, blocks)
    assert (kept >= quality - 1e-6).all()
    torch.testing.assert_close(plan.recall.double(), kept, rtol=1e-5, atol=1e-6)
    # Blocks are compared by what they cost: a ragged one is cheaper than a full one.
    scores = mass.double() * (blocks.block_k / blocks.key_sizes.double())
    removable = mask & ~blocks.always_kept
    lightest = scores.masked_fill(~removable, torch.inf).amin((-2, -1), keepdim=True)
    assert (scores.masked_fill(mask, 0.0) <= lightest * 1.001).all()
    # Scores of equal mass are spread by up to a thousandth, so any of the lightest may be the last.
    last = removable & (scores <= lightest * 1.001)
    share = (mass.double() * weights[:, None]).masked_fill(~last, 0.0).amax((-2, -1))
    assert (~removable.any((-2, -1)) | (kept - share < quality)).all()


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("spread", ["need", "even", "equal"])
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_density_is_met_within_one_block_per_row(scene, spread, density):
    blocks = scene.blocks
    plan, mask = allot(draw_mass(scene), blocks, density=density, spread=spread)
    forced = blocks.always_kept.float().mean()
    if forced < density - 0.1:
        realised = plan.density.mean(-1)
        assert (realised <= density + 1e-5).all()
        assert (realised > density - 1 / mask.shape[-1]).all()


def test_need_keeps_more_mass_than_equal_budgets_and_floors_every_row(monkeypatch):
    monkeypatch.setattr(budgets, "FLOOR", 3)
    scene = Scene(tokens=256, video_tokens=256, heads=3)
    mass, blocks = draw_mass(scene), scene.blocks
    # One row whose mass is spread so thin that no block passes the threshold.
    thin = torch.linspace(0.9, 1.1, mass.shape[-1]) / mass.shape[-1]
    mass[0, 0, 4] = thin
    by_need, mask = allot(mass, blocks, density=0.4, spread="need")
    equal, equal_mask = allot(mass, blocks, density=0.4, spread="equal")
    assert by_need.recall.mean() > equal.recall.mean()
    assert (mask.gather(-1, mass.topk(3).indices)).all()
    assert by_need.counts.float().std() > 1
    assert equal.counts.max() - equal.counts.min() <= 1
    order = (mass + blocks.always_kept).argsort(-1, descending=True)
    in_order = equal_mask.gather(-1, order).long()
    assert (in_order.diff(dim=-1) <= 0).all(), "equal budgets skip a heavier block"


@pytest.mark.parametrize("spread", ["need", "even", "equal"])
def test_ties_are_spread_over_rows_and_columns(spread, monkeypatch):
    monkeypatch.setattr(budgets, "FLOOR", 0)
    scene = Scene(tokens=1024, video_tokens=1024, heads=2)
    blocks = scene.blocks
    mass = torch.full((1, 2, 32, 64), 1 / 64)
    plan, mask = allot(mass, blocks, density=0.25, spread=spread)
    torch.testing.assert_close(plan.density, torch.full((1, 2), 0.25), rtol=0, atol=1 / 64)
    assert plan.counts.min() >= 12 and plan.counts.max() <= 20
    if spread != "equal":
        columns = mask.sum(-2)
        assert columns.min() >= 4 and columns.max() <= 12


def test_even_budgets_drop_the_least_in_squares(monkeypatch):
    monkeypatch.setattr(budgets, "FLOOR", 0)
    scene = Scene(tokens=256, video_tokens=256, heads=3)
    mass, blocks = draw_mass(scene), scene.blocks
    lost = {}
    for spread in ("need", "even", "equal"):
        _, mask = allot(mass, blocks, density=0.4, spread=spread)
        dropped = (mass * ~mask).sum(-1)
        lost[spread] = (dropped.mean().item(), dropped.square().mean().item())
        if spread == "even":
            # Swapping the last block of one row for the next of another gains nothing.
            free = (mass * (2 * dropped[..., None] + mass)).masked_fill(
                ~mask | blocks.always_kept, torch.inf
            )
            next_ones = (mass * (2 * dropped[..., None] - mass)).masked_fill(mask, 0.0)
            assert next_ones.max() <= free.min() * 1.003
    assert lost["even"][1] < min(lost["need"][1], lost["equal"][1])
    assert lost["need"][0] <= lost["even"][0] < lost["equal"][0]


def test_items_of_a_batch_do_not_see_each_other():
    scene = SCENES["grouped heads, batch"]
    mass, blocks = draw_mass(scene), scene.blocks
    together, _ = allot(mass, blocks, density=0.5)
    for item in range(scene.batch):
        alone, _ = allot(mass[item : item + 1], blocks, density=0.5)
        assert torch.equal(alone.indices, together.indices[item : item + 1])


@pytest.mark.parametrize("spread", ["need", "even", "equal"])
@pytest.mark.parametrize("target", [{"density": 0.5}, {"quality": 0.6}], ids=str)
def test_a_boost_takes_nothing_from_other_heads(target, spread):
    scene = Scene(batch=2, tokens=256, video_tokens=256)
    mass, blocks = draw_mass(scene), scene.blocks
    plain, mask = allot(mass, blocks, **target, spread=spread)
    ones = torch.ones(scene.batch, scene.heads)
    same, _ = allot(mass, blocks, **target, spread=spread, boost=ones)
    assert torch.equal(same.counts, plain.counts) and torch.equal(same.indices, plain.indices)
    boost = ones.clone()
    boost[0, 0], boost[1, 1] = 3.0, torch.inf
    _, boosted = allot(mass, blocks, **target, spread=spread, boost=boost)
    assert torch.equal(boosted[boost == 1], mask[boost == 1])
    assert (boosted[0, 0] >= mask[0, 0]).all() and boosted[0, 0].sum() > mask[0, 0].sum()
    assert boosted[1, 1].all() and not mask[1, 1].all()


@pytest.mark.parametrize("target", ["quality", "density"])
def test_a_target_of_one_keeps_all(target):
    scene = Scene()
    plan, mask = allot(draw_mass(scene).clamp(min=1e-3), scene.blocks, **{target: 1.0})
    assert mask.all() and (plan.density > 1 - 1e-5).all()


def test_rows_without_any_key_lose_nothing():
    scene = Scene()
    plan, mask = allot(torch.zeros(1, 3, 5, 10), scene.blocks, quality=0.9)
    assert (plan.recall == 1).all()
    assert torch.equal(mask[0, 0], scene.blocks.always_kept)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_no_other_lists_of_the_same_density_keep_more_mass(scene):
    q, k, bias, scale = make_inputs(scene)
    mass = average_blocks(weigh_tokens(q, k, bias, scale), scene.block_q, scene.block_k)
    best = plan_exactly(scene, q, k, bias, scale, 0.7, True, spread="need")
    # What each block adds to the mean over all queries.
    gain = mass * (scene.blocks.query_sizes / scene.tokens)[:, None]
    mask = check_plan(best, scene.blocks)
    for cells in ((8, 8), (scene.block_q, scene.block_k)):
        goal = (bias, scale, 0.7, True)
        plan = Plan(*torch.ops.ditopt.subblock_plan_v2(q, k, *goal, *scene.place, *cells))
        kept = (gain * check_plan(plan, scene.blocks)).sum((1, 2, 3))
        # One more block may have had room in the other's budget.
        room = gain.masked_fill(mask, 0.0).amax((1, 2, 3))
        assert (kept <= (gain * mask).sum((1, 2, 3)) + room).all()


@pytest.mark.parametrize(
    "targets, named",
    [
        ({"quality": 0.0}, "target quality is 0.0"),
        ({"density": 1.5}, "target density is 1.5"),
        ({"density": 0.5, "spread": "fair"}, "spread is 'fair'"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(targets, named):
    scene = dataclasses.replace(Scene(), heads=1)
    with pytest.raises(ValueError, match=named):
        allot(draw_mass(scene), scene.blocks, **targets)


KERNELS = ("score_blocks", "square_losses", "rate_recall", "measure_kept")


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    scene=st.sampled_from(list(SCENES.values())),
    spread=st.sampled_from(["need", "even", "equal"]),
    target=st.sampled_from(["density", "quality"]),
    share=st.floats(0.05, 1.0),
    ties=st.booleans(),
)
def test_the_cpp_kernels_and_torch_keep_the_same_blocks(seed, scene, spread, target, share, ties):
    if load_library() is None:
        pytest.skip("there is no C++ compiler")
    mass = draw_mass(scene, seed)
    if ties:
        mass = (mass * 64).round() / 64
    goal = (scene.blocks, share, target == "density")
    plan = allot_blocks(mass, *goal, spread=spread)
    # Which of equal scores fill the last places is open, so there is room for all that are forced.
    compared = max(share, scene.blocks.always_kept.float().mean().item() + 0.02)
    rated = rate_recall(mass, compared, scene.blocks)
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(budgets.cpp, name, lambda *_: None)
        other = allot_blocks(mass, *goal, spread=spread)
        expected = rate_recall(mass, compared, scene.blocks)
    assert torch.equal(plan.counts, other.counts) and torch.equal(plan.indices, other.indices)
    torch.testing.assert_close(plan.recall, other.recall, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plan.density, other.density, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rated, expected, rtol=1e-6, atol=1e-7)


def test_plans_are_the_same_whatever_the_default_dtype_is():
    scene = SCENES["text after"]
    mass = draw_mass(scene)
    expected = allot_blocks(mass, scene.blocks, 0.4, True)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        # Another layout with the same blocks: tables are made once for each.
        blocks = dataclasses.replace(scene.blocks)
        found = allot_blocks(mass, blocks, 0.4, True)
    finally:
        torch.set_default_dtype(default)
    for part, other in zip(found.tensors, expected.tensors, strict=True):
        assert torch.equal(part, other)


def test_mass_that_is_no_number_makes_a_plan_all_the_same():
    scene = Scene(tokens=4096, video_tokens=4096)
    mass = draw_mass(scene)
    mass[:, 0] = torch.nan
    mass[:, 1, ::2, ::3] = torch.nan
    for spread in ("need", "even"):
        allot(mass, scene.blocks, density=0.2, spread=spread)
    assert rate_recall(mass, 0.2, scene.blocks)[:, 2].isfinite().all()


def test_nan_counts_as_the_least_value_in_the_cpp_kernels():
    if load_library() is None:
        pytest.skip("there is no C++ compiler")
    scene = SCENES["video only"]
    mass = draw_mass(scene)
    mass[..., ::3] = torch.nan
    least = mass.nan_to_num(0.0)
    ties = torch.ones(mass.shape[-2:])
    widths = torch.ones(mass.shape[-1])
    for kernel, rest in (("score_blocks", (widths, ties)), ("square_losses", (ties,))):
        run = getattr(budgets.cpp, kernel)
        found = run(mass, *rest, *budgets._BOUNDS)
        assert torch.equal(found, run(least, *rest, *budgets._BOUNDS)) and found.isfinite().all()


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_recall_at_a_density_that_makes_no_sense_is_refused(density):
    scene = SCENES["video only"]
    with pytest.raises(ValueError, match=f"target density is {density}"):
        rate_recall(draw_mass(scene), density, scene.blocks)
