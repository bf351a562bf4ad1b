"""Sparse attention pays from the root of a polynomial on, and nowhere at too high a density."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from dit_opt.policy import cost

DEVICE = cost.Device(
    rate=1e12,
    bandwidth=1e11,
    efficiency=0.8,
    search=0.5,
    launch=1e-5,
    sparse_keys=30,
    sparse_head=1e-5,
)
STEP = cost.Step(
    density=0.2,
    least_keys=256,
    pairs=cost.TOKENS**2 / 16,
    search_operators=100,
    operators=20,
    steps=5,
    moved=4,
)


def predict(heads=8, dim=64, itemsize=4, device=DEVICE, **changes):
    return cost.predict(heads, dim, itemsize, dataclasses.replace(STEP, **changes), device)


def test_dense_attention_takes_four_flop_for_each_pair_and_channel():
    b, n = sympy.symbols("b n")
    assert cost.dense_flops(3 * b, n, 77, 64) == 4 * 3 * b * n * 77 * 64


@pytest.mark.parametrize(("n", "kept"), [(4096, 0.2 * 4096), (1024, 256)])
def test_times_are_sums_of_their_parts(n, kept):
    found = predict()
    flops = 4 * 8 * n * n * 64
    dense, sparse = found.spend(n)
    assert dense == pytest.approx(flops / 1e12 + 1e-5)
    parts = {
        "attention": (kept + 30) / n * flops / 0.8e12,
        "search": (2 * 8 * 64 * n * n / 16 / 0.5e12 + 100 * 1e-5) / 5,
        "moves": 4 * 2 * 8 * n * 64 * 4 / 1e11,
        "launches": 20 * 1e-5 + 8 * 1e-5,
    }
    assert sparse == pytest.approx(sum(parts.values()))
    assert found.gain(n) == pytest.approx(dense / sparse)


@given(
    heads=st.integers(1, 64),
    dim=st.sampled_from([64, 128]),
    density=st.floats(0.01, 0.7),
    least_keys=st.integers(0, 4096),
    operators=st.integers(1, 500),
    steps=st.integers(1, 50),
    moved=st.integers(0, 4),
    rate=st.floats(1e10, 1e15),
)
def test_sparse_attention_is_faster_from_the_crossover_on(heads, dim, rate, **step):
    found = predict(heads, dim, device=dataclasses.replace(DEVICE, rate=rate), **step)
    n = found.crossover
    assert n is not None
    assert found.gain(n) >= 1 - 1e-9 and found.gain(2 * n) > 1
    assert n == 1 or found.gain(n - 1) < 1 + 1e-9


@pytest.mark.parametrize("density", [0.8, 0.9, 1.0])
def test_nothing_pays_where_the_kernel_is_slower_than_what_it_skips(density):
    assert predict(density=density).crossover is None


def test_a_search_that_costs_as_much_as_attention_saves_pays_only_when_it_is_shared():
    every_pair = cost.TOKENS**2
    assert predict(pairs=every_pair, steps=1).crossover is None
    assert predict(pairs=every_pair, steps=10).crossover is not None


def test_more_heads_and_rarer_searches_pay_sooner():
    lengths = [predict(heads=heads).crossover for heads in (1, 8, 64)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert predict(steps=1).crossover > predict(steps=50).crossover


def test_a_step_without_overhead_pays_at_once():
    device = dataclasses.replace(DEVICE, sparse_keys=0.0, sparse_head=0.0)
    nothing = {"operators": 0, "moved": 0, "search_operators": 0}
    assert predict(device=device, least_keys=0, **nothing).crossover == 1


def test_what_every_query_keeps_sets_the_least_length_that_pays():
    found = predict(density=0.01, least_keys=2048, operators=0, moved=0, search_operators=0)
    assert found.crossover is not None and found.crossover > 2048


def test_devices_are_found_by_a_part_of_their_name():
    assert cost.find_device("cpu") is cost.DEVICES["cpu"]
    assert cost.find_device("NVIDIA H200") is cost.DEVICES["H200"]
    assert cost.find_device("NVIDIA A100-SXM4-80GB") is cost.DEVICES["A100"]
    assert cost.find_device("a card of next year") is cost.DEVICES[""]
