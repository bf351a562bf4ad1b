"""Sampled rows are weighed exactly, whatever the parts they are taken in."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.cpp.build import load_library
from dit_opt.kernels.searches.mass import sampled as sampled_mass
from dit_opt.kernels.searches.mass.sampled import lay_sums, measure_sampled_mass

from .scenes import SCENES, make_inputs, weigh_tokens


@pytest.fixture
def torch_path(monkeypatch):
    """Masses by torch's operators, as where there is no compiler."""
    monkeypatch.setattr(sampled_mass, "can_sample", lambda k: False)


@pytest.fixture
def sampled(monkeypatch):
    """How often the C++ kernel was called."""
    calls, sample_mass = [], sampled_mass.sample_mass
    monkeypatch.setattr(sampled_mass, "sample_mass", lambda *a: calls.append(1) or sample_mass(*a))
    return calls


ROWS = torch.tensor([0, 3, 17, 60, 98])


def measure(scene, dtype=torch.float32):
    """[B, H, rows, blocks] of blocks of 16 keys, in the given order and then backwards."""
    q, k, bias, scale = make_inputs(scene)
    order = torch.arange(scene.tokens)
    sums = lay_sums(torch.stack([order, order.flip(0)]), 16, q.device)
    group = scene.heads // scene.key_heads
    blocks = len(sums[-1].offsets)
    mass = torch.full((scene.batch, scene.key_heads, group, len(ROWS), blocks), torch.nan)
    parts = 0
    inputs = (q.to(dtype), k.to(dtype), ROWS, sums, scale, bias)
    for part in measure_sampled_mass(*inputs):
        mass[part.item, part.keys, part.group, part.rows] = part.mass.permute(0, 2, 3, 1)
        parts += 1
    weights = weigh_tokens(q, k, bias, scale)[:, :, ROWS]
    both = [
        torch.stack([x.sum(-1) for x in w.split(16, -1)], -1) for w in (weights, weights.flip(-1))
    ]
    return mass.flatten(1, 2), torch.cat(both, -1).float(), parts


@pytest.mark.parametrize("many", [1, 10**9])
@pytest.mark.parametrize("name", SCENES)
def test_the_mass_is_the_softmax_summed_over_blocks(name, many, monkeypatch, torch_path):
    monkeypatch.setattr(sampled_mass, "_MANY_ROWS", many)
    found, expected, _ = measure(SCENES[name])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SCENES)
def test_weights_less_the_greatest_score_are_the_same(name, monkeypatch, torch_path):
    monkeypatch.setattr(sampled_mass, "_choose_softmax", lambda *a: "shift")
    found, expected, _ = measure(SCENES[name])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SCENES)
def test_the_cpp_kernel_measures_the_same_mass(name, sampled):
    if load_library() is None:
        pytest.skip("there is no C++ compiler")
    scene = SCENES[name]
    found, expected, _ = measure(scene)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert bool(sampled) == (not scene.bias)


def test_the_cpp_kernel_writes_float32_whatever_the_default_is(sampled):
    if load_library() is None:
        pytest.skip("there is no C++ compiler")
    q, k, _, scale = make_inputs(SCENES["video only"])
    sums = lay_sums(torch.arange(q.shape[2])[None], 16, q.device)
    (expected,) = (part.mass for part in measure_sampled_mass(q, k, ROWS, sums, scale))
    torch.set_default_dtype(torch.float64)
    try:
        (found,) = (part.mass for part in measure_sampled_mass(q, k, ROWS, sums, scale))
    finally:
        torch.set_default_dtype(torch.float32)
    assert sampled and found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("factor", [1, 1000])
def test_only_small_scores_are_summed_as_they_are(factor, monkeypatch, torch_path):
    monkeypatch.setattr(sampled_mass, "_MANY_ROWS", 1)
    softmax, used = torch.softmax, []
    monkeypatch.setattr(torch, "softmax", lambda *a, **kw: used.append(1) or softmax(*a, **kw))
    q, k, _, scale = make_inputs(SCENES["video only"])
    order = torch.arange(q.shape[2])
    strides = torch.cat([order[i::7] for i in range(7)])
    for other, levels in ((order.roll(8), 2), (strides, 1)):
        orders = torch.stack([order, other])
        sums = lay_sums(orders, 4, q.device)
        assert len(sums) == levels
        for part in measure_sampled_mass(q * factor, k, ROWS, sums, scale):
            total = part.mass.sum(1)
            torch.testing.assert_close(total, torch.full_like(total, len(orders)))
    assert bool(used) == (factor > 1)


@pytest.mark.parametrize("name", ["grouped heads, batch", "bias"])
@pytest.mark.parametrize("columns", [1, 3, 6, 10])
def test_parts_make_the_same_whole(name, columns, monkeypatch, torch_path):
    monkeypatch.setattr(sampled_mass, "_MANY_ROWS", 1)
    scene = SCENES[name]
    whole, _, fewest = measure(scene)
    monkeypatch.setattr(sampled_mass, "_CPU_SCORE_BYTES", 4 * scene.tokens * columns)
    found, _, parts = measure(scene)
    assert parts > fewest
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("many", [1, 10**9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype, many, monkeypatch):
    monkeypatch.setattr(sampled_mass, "_MANY_ROWS", many)
    found, expected, _ = measure(SCENES["video only"], dtype)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)
    torch.testing.assert_close(found.sum(-1), torch.full_like(found[..., 0], 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("columns", [1, 3, 1000])
def test_an_item_or_a_head_without_any_key_has_no_mass(columns, monkeypatch):
    scene = SCENES["grouped heads, batch"]
    q, k, _, scale = make_inputs(scene)
    monkeypatch.setattr(sampled_mass, "_CPU_SCORE_BYTES", 4 * scene.tokens * columns)
    sums = lay_sums(torch.arange(scene.tokens)[None], 16, q.device)
    by_item = torch.zeros(2, 1, scene.tokens)
    by_item[1] = -torch.inf
    by_head = torch.zeros(1, scene.heads, scene.tokens)
    by_head[:, 1] = -torch.inf
    for bias, bare in ((by_item, (1, slice(None))), (by_head, (slice(None), 1))):
        total = torch.full((2, scene.key_heads, scene.heads // scene.key_heads, 5), torch.nan)
        for part in measure_sampled_mass(q, k, ROWS, sums, scale, bias):
            total[part.item, part.keys, part.group, part.rows] = part.mass.sum(1)
        expected = torch.ones(2, scene.heads, 5)
        expected[bare] = 0.0
        torch.testing.assert_close(total.flatten(1, 2), expected)


def test_orders_that_share_no_tokens_are_summed_at_once_and_others_in_two_levels():
    order = torch.arange(96)
    values = torch.rand(1, 96, 3)
    for other, levels in ((order.view(16, 6).t().flatten(), 1), (order.roll(8), 2)):
        sums = lay_sums(torch.stack([order, other]), 4, values.device)
        assert len(sums) == levels
        found = values
        for level in sums:
            repeated = sampled_mass._repeat(level, found.shape[1], 1)
            found = sampled_mass._sum(found, repeated)
        expected = [values[0, rows].sum(0) for o in (order, other) for rows in o.split(4)]
        torch.testing.assert_close(found[0], torch.stack(expected))
