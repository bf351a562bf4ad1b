"""Thresholds keep the fewest that reach a target, or the most that stay within it, to one entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_opt.kernels.plan import thresholds
from dit_opt.kernels.plan.thresholds import HEAVIEST, LIGHTEST, find_threshold


@pytest.fixture(params=["cpp", "torch"])
def path(request, monkeypatch):
    """The C++ kernel, where there is a compiler, and torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(thresholds.cpp, "can_search", lambda: False)
    elif not thresholds.cpp.can_search():
        pytest.skip("there is no C++ compiler")


@pytest.mark.usefixtures("path")
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 0.99), within=st.booleans())
def test_one_entry_fewer_or_more_misses_the_target(seed, share, within):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, 11, generator=generator).pow(8).clamp(min=LIGHTEST)
    gains = torch.rand(3, 11, generator=generator) + 0.01
    target = share * gains.sum()
    threshold = find_threshold(scores, gains, target, (-2, -1), within=within)
    assert threshold.shape == (2, 1, 1)
    for item, limit in zip(scores, threshold.flatten(), strict=True):
        kept = item >= limit
        total = gains[kept].sum()
        if within:
            assert total <= target
            heaviest_left = item[~kept].max()
            assert total + gains[item == heaviest_left].sum() > target
        else:
            assert total >= target
            assert limit == item[kept].min()
            assert total - gains[item == limit].sum() < target


@pytest.mark.usefixtures("path")
def test_infinite_scores_are_kept_beyond_any_target():
    scores = torch.tensor([torch.inf, 0.5, torch.inf, 1.0])
    one = torch.ones(4)
    assert find_threshold(scores, one, 1.0, (-1,), within=True).item() > 1.0
    assert find_threshold(scores, one, 2.0, (-1,)).item() == HEAVIEST
    assert find_threshold(scores, one, 3.0, (-1,)).item() == 1.0


@pytest.mark.usefixtures("path")
def test_everything_is_kept_where_no_threshold_reaches():
    scores = torch.tensor([LIGHTEST, 0.5])
    for within in (False, True):
        assert find_threshold(scores, torch.ones(2), 9.0, (-1,), within=within).item() == LIGHTEST
