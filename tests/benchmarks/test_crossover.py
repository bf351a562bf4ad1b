from __future__ import annotations

import math

import pytest
import torch

from benchmarks import crossover


def test_videos_have_about_the_asked_tokens():
    for tokens in (64, 256, 1000, 4096, 32768):
        grid = crossover.choose_grid(tokens)
        assert math.prod(grid) == pytest.approx(tokens, rel=0.25) and grid[1] == grid[2]


def test_a_length_is_measured_and_predicted():
    row = crossover.measure_length(256, 2, 32, 0.4, torch.device("cpu"), 0.01)
    times = {name: t["median"] for name, t in row["milliseconds"].items()}
    assert set(times) == {"dense", "sparse", "search", "moves"} and min(times.values()) > 0
    step = times["sparse"] + times["moves"] + times["search"] / 10
    assert row["gain"] == pytest.approx(times["dense"] / step)
    predicted = row["predicted_milliseconds"]
    assert row["predicted_gain"] == pytest.approx(predicted["dense"] / predicted["step"])
    result = {"lengths": [row], "crossover": None, "predicted_crossover": 300}
    assert "no length" in crossover.render(result) and "300" in crossover.render(result)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([2.0, 3.0], 100),
        ([0.5, 0.9], None),
        # one half of the way from 100 to 400, by the logarithm
        ([0.5, 1.5], 200),
        # a gain that is lost again is none
        ([1.5, 0.5, 1.5], 800),
    ],
)
def test_the_crossover_is_where_the_gain_passes_one_for_good(gains, expected):
    rows = [{"tokens": 100 * 4**i, "gain": gain} for i, gain in enumerate(gains)]
    found = crossover.find_crossover(rows)
    assert found == (None if expected is None else pytest.approx(expected))
