"""The search part at toy sizes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_routers import measure_grid
from dit_opt.options import DEFAULT_REFRESH_EVERY


def test_a_grid_has_the_share_of_every_search():
    row = measure_grid((4, 16, 16), torch.device("cpu"), 0.0, heads=2, dim=16)
    times = {name: t["median"] for name, t in row["milliseconds"].items()}
    searches = {"headwise", "adaspa", "subblock", "sol", "rainfusion"}
    assert set(times) == searches | {"dense", "sparse", "moves"}
    assert row["share_of_dense"]["sol"] == pytest.approx(times["sol"] / times["dense"])
    spent = times["sparse"] + times["moves"] + times["headwise"] / DEFAULT_REFRESH_EVERY
    assert row["speedup_with_search"] == pytest.approx(times["dense"] / spent)
