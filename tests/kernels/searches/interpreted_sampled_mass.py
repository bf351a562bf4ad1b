"""Cases for the kernels of sampled rows; `test_sampled_mass_triton.py` runs them in a process of
their own.

TRITON_INTERPRET must be set before the kernels' module is imported, and would change every other
test of the same process. bfloat16 is left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.headwise.head_orders import build_orders, list_orders, list_rows
from dit_opt.kernels.searches.mass.impl.triton import sampled as triton_sampled

from .scenes import CPU, Scene, average_blocks, make_inputs, weigh_tokens

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3}
GRID = (3, 4, 6)

CASES = {
    "text before": Scene(tokens=81, video_start=9, heads=2, key_heads=2),
    "no ragged block, grouped heads": Scene(tokens=96, heads=2, key_heads=1, block_k=32),
    "bias, batch": Scene(tokens=75, batch=2, heads=2, key_heads=2, bias=True),
    "several tiles per block": Scene(
        tokens=75, heads=1, key_heads=1, dim=40, block_q=128, block_k=128
    ),
}


def measure(case, cell, dtype):
    """What the kernels find, and what plain arithmetic says."""
    q, k, bias, scale = make_inputs(case)
    q, k = q.to(dtype), k.to(dtype)
    if bias is not None:
        # an item without any key
        bias[1:] = -torch.inf
    layout = VideoLayout(*GRID, case.video_start, case.tokens)
    orders = build_orders(layout, case.block_q, case.block_k, cell, CPU)
    _, inverses = list_orders(layout, case.block_q, case.block_k, CPU)
    means = list_rows(inverses[:, orders.rows], orders.rows, case.tokens, case.block_q)
    means = means.to(torch.device(DEVICE))
    tensors = (x.to(DEVICE) for x in (q, k, orders.orders))
    bias_there = None if bias is None else bias.to(DEVICE)
    found = triton_sampled.measure_orders(*tensors, means, scale, bias_there, case.block_k)
    weights = weigh_tokens(q, k, bias, scale).nan_to_num()[:, :, orders.rows]
    expected = []
    for order, mean in zip(orders.orders, orders.means, strict=True):
        parts = weights[..., order].split(case.block_k, -1)
        expected.append(mean.double() @ torch.stack([part.sum(-1) for part in parts], -1))
    return found.cpu(), torch.stack(expected, 2).float()


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("cell", [1, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_plain_arithmetic(case, cell, dtype):
    found, expected = measure(case, cell, dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=ERRORS[dtype], atol=ERRORS[dtype])
    if case.bias:
        assert found[0].sum() > 0 and not found[1].any()


ALL_ROWS = {
    "ragged": Scene(tokens=75, heads=2, key_heads=2),
    "even, grouped heads": Scene(tokens=64, heads=2, key_heads=1),
    "bias, batch": Scene(tokens=70, batch=2, heads=1, key_heads=1, bias=True),
    "blocks of eight rows": Scene(tokens=75, heads=2, key_heads=2, block_q=8),
    "blocks of one row": Scene(tokens=35, heads=1, key_heads=1, block_q=1),
    "several tiles per block": Scene(
        tokens=150, heads=1, key_heads=1, dim=40, block_q=128, block_k=128
    ),
}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("case", ALL_ROWS.values(), ids=ALL_ROWS.keys())
def test_all_rows_give_the_mass_of_blocks(case, dtype):
    q, k, bias, scale = make_inputs(case)
    q, k = q[:, :, :-3].to(dtype), k.to(dtype)
    if bias is not None:
        bias[0] = -torch.inf
    there = [None if x is None else x.to(DEVICE) for x in (q, k, bias)]
    blocks = (case.block_q, case.block_k)
    found = triton_sampled.measure_blocks(*there[:2], scale, *blocks, there[2])
    expected = average_blocks(weigh_tokens(q, k, bias, scale).nan_to_num(), *blocks).float()
    torch.testing.assert_close(found.cpu(), expected, rtol=ERRORS[dtype], atol=ERRORS[dtype])


def test_key_blocks_that_tiles_cannot_cover_are_refused():
    q, k, _, scale = make_inputs(Scene(tokens=64))
    for block_k in (24, 8):
        with pytest.raises(ValueError, match=f"block_k={block_k} must be a power of two"):
            triton_sampled.measure_blocks(q, k, scale, 32, block_k, None)


def test_heads_one_after_the_other_find_the_same(monkeypatch):
    case = CASES["bias, batch"]
    whole, _ = measure(case, 4, torch.float32)
    monkeypatch.setattr(triton_sampled, "_SHARE_BYTES", 1)
    found, _ = measure(case, 4, torch.float32)
    assert torch.equal(found, whole)


def test_every_number_is_written(monkeypatch):
    empty = torch.Tensor.new_empty

    def poison(*args, **options):
        fresh = empty(*args, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    for case in CASES.values():
        found, _ = measure(case, 4, torch.float32)
        assert found.isfinite().all()
