from __future__ import annotations

import pytest
import torch

from benchmarks import adaptive
from benchmarks.attention_mass import NOISE_LEVELS


@pytest.fixture
def small(monkeypatch):
    """A grid of 8 x 8 x 8, so that everything takes no time."""
    monkeypatch.setattr(adaptive, "GRID", (8, 8, 8))
    monkeypatch.setattr(adaptive, "TOKENS", 512)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    return [adaptive.Call(layer, 3 * q, k, v) for layer in range(2)]


def test_spreading_budgets_lifts_the_low_end(small):
    found = adaptive.measure_recalls(small, 0.4)
    assert set(found) == {"equal", "need", "even"}
    for row in found.values():
        assert 0 < row["least"] <= row["5th_percentile"] <= row["mean"] <= 1
    # the best sum is that of need; the best low end is not
    assert found["need"]["mean"] >= found["equal"]["mean"]
    assert found["even"]["5th_percentile"] >= found["need"]["5th_percentile"]


def test_errors_are_those_of_each_layer(small):
    first, second = adaptive.measure_tails(small, 0.4)
    assert (first["layer"], second["layer"]) == (0, 1)
    assert 0 < first["centroid"] < first["drop"] < 1 and first["drop"] == second["drop"]


def test_searches_are_timed_beside_dense_attention(small):
    found = adaptive.measure_searches(small[0], 0.4, 0.01)
    assert set(found["share_of_dense"]) == {"headwise", "adaspa", "subblock", "sol", "rainfusion"}
    median = {name: row["median"] for name, row in found["milliseconds"].items()}
    for name, row in found["share_of_trajectory"].items():
        # of a step, in units of attention
        spent = {every: share / (1 - share) * median["sparse"] for every, share in row.items()}
        assert spent[1] == pytest.approx(median[name])
        kept = 0 if name == "rainfusion" else (median["pack"] + 9 * median["unpack"]) / 10
        assert spent[10] == pytest.approx(median[name] / 10 + kept)
    result = {
        "density": 0.4,
        "recall": adaptive.measure_recalls(small, 0.4),
        "recall_in_one_order": {"cubes": adaptive.measure_recalls(small, 0.4)},
        "tail": adaptive.measure_tails(small, 0.4),
        "search": found,
    }
    assert "subblock" in adaptive.render(result) and "layer 1" in adaptive.render(result)


def test_calls_are_recorded_and_put_into_the_order_of_each_head_or_into_one():
    class Block(torch.nn.Module):
        pass

    class Model(torch.nn.Module):
        """One layer that looks at its own place in all frames; values number the tokens."""

        def __init__(self):
            super().__init__()
            self.blocks = [Block()]

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            number = torch.arange(adaptive.TOKENS)
            place = 16 * torch.nn.functional.one_hot(number % 256)[None, None].float()
            v = number.float().view(1, 1, -1, 1).expand_as(place)
            torch.nn.functional.scaled_dot_product_attention(query=place, key=place, value=v)

    calls = adaptive.record_calls(Model())
    assert len(calls) == len(NOISE_LEVELS) and {c.layer for c in calls} == {0}
    numbers = torch.arange(adaptive.TOKENS)
    assert torch.equal(calls[0].v[0, 0, :, 0].long(), numbers)
    order = adaptive.order_tokens(calls[0], 0.125).v[0, 0, :, 0].long()
    assert torch.equal(order.sort().values, numbers)
    # four columns through all sixteen frames
    assert len((order[:64] % 256).unique()) == 4 and len((order[:64] // 256).unique()) == 16
    raster = adaptive.order_tokens(calls[0], 0.125, "raster")
    assert torch.equal(raster.v, calls[0].v) and torch.equal(raster.q, calls[0].q)
    cubes = adaptive.order_tokens(calls[0], 0.125, "cubes").v[0, 0, :, 0].long()
    # of 16 x 16 x 16, each 4 x 4 x 4
    t, h, w = cubes[:64] // 256, cubes[:64] // 16 % 16, cubes[:64] % 16
    assert [len(axis.unique()) for axis in (t, h, w)] == [4, 4, 4]
