"""Cases for the Triton kernel; `test_triton.py` runs them in a process of their own.

TRITON_INTERPRET must be set before the kernel's module is imported, and would change every other
test of the same process. bfloat16 is left out: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.contract import new_outputs
from dit_opt.kernels.block_sparse_attention.impl.triton import attention as kernel
from dit_opt.kernels.block_sparse_attention.impl.triton.candidates import list_candidates
from dit_opt.kernels.block_sparse_attention.impl.triton.row_order import order_rows
from dit_opt.kernels.block_sparse_attention.impl.triton.tail import pack_lists
from dit_opt.kernels.block_sparse_attention.reference import expand_lists

from .plans import Case, assert_matches_reference, make_call, make_inputs, make_plan

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ERRORS = {torch.float32: (3e-6, 3e-6), torch.float16: (3e-3, 3e-6)}

CASES = {
    "even": Case(dim=64, queries=256, keys=256, block_q=128),
    "ragged": Case(dim=64, queries=150, keys=201),
    "ragged below one tile": Case(dim=48, queries=70, keys=130, block_q=128, block_k=128),
    "a tile beyond the end": Case(dim=64, queries=180, keys=130, block_q=128),
    "grouped heads, batch": Case(batch=2, heads=4, key_heads=2, dim=32, queries=100, keys=190),
    "one plan each": Case(batch=2, plan_batch=2, dim=64, queries=150, keys=150),
    "bias": Case(batch=2, bias=True, dim=64, queries=150, keys=201),
    "bias, even": Case(bias=True, dim=80, queries=128, keys=256, block_k=128),
    "empty": Case(density=0.0, dim=64),
    "strided": Case(batch=2, strided=True, dim=80, queries=150, keys=150),
    "unaligned": Case(dim=33, queries=100, keys=150),
    "wide": Case(dim=128, queries=150, keys=150, block_k=128),
    "widest": Case(heads=1, key_heads=1, dim=256, queries=70, keys=100),
    "small blocks": Case(dim=32, queries=100, keys=100, block_q=32, block_k=16),
    "tail": Case(tail=True, batch=2, dim=64, queries=150, keys=201),
    "tail, even": Case(tail=True, dim=64, queries=128, keys=256, block_q=128),
    "tail, grouped heads": Case(tail=True, batch=2, heads=4, dim=48, queries=70, keys=190),
    "tail, bias": Case(tail=True, bias=True, batch=2, dim=64, queries=100, keys=201),
    "tail, bias of query heads": Case(
        tail=True, bias=True, bias_heads=4, heads=4, dim=32, queries=70, keys=150
    ),
    "tail, strided, one plan each": Case(
        tail=True, strided=True, batch=2, plan_batch=2, dim=80, queries=70, keys=150
    ),
    "tail, unaligned": Case(tail=True, dim=33, queries=70, keys=150),
    "tail, empty": Case(tail=True, density=0.0, dim=64, queries=70, keys=150),
    "tail, many blocks": Case(
        tail=True, heads=2, key_heads=1, dim=32, queries=40, keys=600, block_q=32, block_k=16
    ),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that whatever is not written shows."""

    def new_poisoned(q):
        out, lse = new_outputs(q)
        return out.fill_(torch.nan), lse.fill_(torch.nan)

    monkeypatch.setattr(kernel, "new_outputs", new_poisoned)


def launch(arguments, **options):
    """Run the kernel on the device of these tests."""
    return tuple(x.cpu() for x in kernel.attend(make_call(arguments, DEVICE), **options))


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case, dtype):
    arguments = make_inputs(case, dtype)
    assert_matches_reference(launch(arguments), arguments, *ERRORS[dtype])


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_candidate_matches_the_reference(dim, block_k):
    case = Case(batch=2, dim=dim, queries=300, keys=300, block_q=128, block_k=block_k)
    arguments = make_inputs(case, torch.float16)
    candidates = list_candidates("sm_90", dim, 2, 128, block_k)
    assert candidates
    for tiling in candidates:
        found = launch(arguments, tiling=tiling)
        assert_matches_reference(found, arguments, *ERRORS[torch.float16])


def test_keys_that_start_off_alignment():
    arguments = list(make_inputs(Case(dim=64, queries=100, keys=150), torch.float16))
    storage = torch.empty(arguments[1].numel() + 1, dtype=torch.float16)
    arguments[1] = storage[1:].view_as(arguments[1]).copy_(arguments[1])
    assert_matches_reference(launch(arguments), tuple(arguments), *ERRORS[torch.float16])


def test_no_keys_at_all():
    arguments = list(make_inputs(Case(dim=32)))
    arguments[1], arguments[2] = arguments[1][:, :, :0], arguments[2][:, :, :0]
    out, lse = launch(arguments)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())


def test_a_tail_without_any_list_entry():
    arguments = list(make_inputs(Case(tail=True, density=0.0, dim=32, queries=70, keys=150)))
    arguments[4] = arguments[4][..., :0]
    assert_matches_reference(launch(arguments), tuple(arguments), *ERRORS[torch.float32])


def test_a_tail_never_reads_the_tokens_of_dropped_blocks():
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[..., 1] = False
    arguments = list(make_inputs(Case(tail=True, dim=64)))
    arguments[3:5] = make_plan(mask)
    expected = launch(arguments)
    arguments[1][:, :, 64:128] = torch.nan
    arguments[2][:, :, 64:128] = torch.nan
    torch.testing.assert_close(launch(arguments), expected, atol=0, rtol=0)


@pytest.mark.parametrize("blocks", [1, 32, 70, 1100])
def test_packed_lists_hold_one_bit_per_block(blocks):
    mask = torch.rand(1, 2, 2, blocks, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, 0, 0], mask[0, 0, 1] = True, False
    counts, indices = make_plan(mask)
    words = pack_lists(counts.to(DEVICE), indices.to(DEVICE), blocks).cpu()
    assert words.shape == (1, 2, 2, -(-blocks // 32)) and words.dtype == torch.int32
    bits = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(-2)[..., :blocks].bool(), expand_lists(counts, indices, blocks))
    assert not bits.flatten(-2)[..., blocks:].any()


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_the_longest_lists_start_first(rows):
    generator = torch.Generator().manual_seed(rows)
    # few lengths, so that many rows have the same
    counts = torch.randint(0, 9, (2, 3, rows), generator=generator, dtype=torch.int32)
    expected = counts.argsort(dim=-1, descending=True, stable=True).int()
    found = order_rows(counts.to(DEVICE)).cpu()
    assert torch.equal(found, expected) and found.dtype == torch.int32
    assert order_rows(counts[:0].to(DEVICE)).shape == (0, 3, rows)
