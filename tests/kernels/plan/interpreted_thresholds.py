"""Cases for the Triton search for thresholds; `test_thresholds_triton.py` runs them in a process of
their own, where TRITON_INTERPRET is set before the kernel is defined."""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.plan import thresholds
from dit_opt.kernels.plan.impl.triton import thresholds as triton_thresholds
from dit_opt.kernels.plan.thresholds import LIGHTEST, find_threshold

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def search_both(scores, gains, target, dims, within, monkeypatch):
    """The threshold by PyTorch and by the kernel, of gains whose sums are exact in any order."""
    monkeypatch.setattr(thresholds, "_find_kernel", lambda scores: thresholds._search_bits)
    expected = find_threshold(scores, gains, target, dims, within=within)
    monkeypatch.setattr(thresholds, "_find_kernel", lambda scores: triton_thresholds.search_bits)
    # few values in a part, so that there are several of them
    monkeypatch.setattr(triton_thresholds, "CHUNK", 64)
    moved = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (scores, gains, target))
    return expected, find_threshold(*moved, dims, within=within).cpu()


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("dims", "repeats"), [((-1,), False), ((-2, -1), False), ((-3, -2, -1), True)]
)
def test_the_threshold_is_that_of_pytorch(dims, repeats, within, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 2, 4, 50, generator=generator).pow(6).clamp(min=LIGHTEST)
    scores[..., 7] = torch.inf
    gains = torch.randint(1, 9, scores.shape, generator=generator) / 8
    gains = gains[0, 0] if repeats else gains
    groups = [1 if axis - 4 in dims else n for axis, n in enumerate(scores.shape)]
    whole = gains.expand(scores.shape).sum(dims, keepdim=True)
    shares = torch.rand(groups, generator=generator)
    expected, found = search_both(scores, gains, whole * shares, dims, within, monkeypatch)
    assert torch.equal(found, expected)


def test_gains_of_columns_serve_all_rows(monkeypatch):
    scores = torch.rand(1, 2, 5, 30, generator=torch.Generator().manual_seed(1))
    gains = torch.arange(30.0)[None]
    expected, found = search_both(scores, gains, 400.0, (-3, -2, -1), True, monkeypatch)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 5])
def test_gains_of_each_head_serve_all_items(rows, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(2, 2, 5, 30, generator=generator)
    gains = torch.randint(1, 9, (2, rows, 30), generator=generator) / 8
    expected, found = search_both(scores, gains, 40.0, (-2, -1), False, monkeypatch)
    assert torch.equal(found, expected) and found.unique().numel() == 4
