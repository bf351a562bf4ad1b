"""The Gluon kernel, replayed on the host: right in every order of its warps, and never stuck."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.block_sparse_attention.contract import Arguments, new_outputs
from dit_opt.kernels.block_sparse_attention.experimental import gluon, variants
from dit_opt.kernels.block_sparse_attention.impl.triton import attention as kernel
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling

from ..plans import Case, assert_matches_reference, flatten_tail, make_inputs, make_plan
from . import gluon_machine
from .gluon_replay import Replay

ERRORS = (3e-3, 3e-6)
CASES = {
    "even": Case(dim=64, queries=256, keys=256, block_q=128),
    "ragged": Case(dim=64, queries=150, keys=201, block_q=128),
    "ragged, wide blocks": Case(dim=128, queries=150, keys=201, block_q=128, block_k=128),
    "grouped heads, batch": Case(
        batch=2, heads=4, dim=64, queries=100, keys=190, block_q=128, strided=True
    ),
    "one plan each": Case(batch=2, plan_batch=2, dim=64, queries=150, keys=150, block_q=128),
    "empty": Case(density=0.0, dim=64, block_q=128),
}


@pytest.fixture(autouse=True)
def sort_rows(monkeypatch):
    """The order of rows by torch, since its kernel needs a GPU or the interpreter."""
    monkeypatch.setattr(
        variants, "order_rows", lambda counts: counts.argsort(-1, descending=True).int()
    )


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that whatever is not written shows."""

    def new_poisoned(q):
        out, lse = new_outputs(q)
        return out.fill_(torch.nan), lse.fill_(torch.nan)

    monkeypatch.setattr(variants, "new_outputs", new_poisoned)


def replay(arguments, seed=0, stages=2, **changes):
    """The launcher of all kernels over this one's own source."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in = Replay(patch, 1000 * seed, changes)
        patch.setattr(gluon, "block_sparse_attention_gluon_kernel", stand_in)
        tiling = Tiling(128, arguments[8], 4, stages, "gluon")
        return kernel.attend(Arguments(*arguments), tiling)


def make_arguments(counts):
    """Lists of these lengths, one for each head of one query block."""
    blocks = max(1, *counts)
    case = Case(heads=len(counts), key_heads=1, dim=64, queries=128, keys=64 * blocks, block_q=128)
    arguments = list(make_inputs(case, torch.float16))
    arguments[3:5] = make_plan(torch.arange(blocks) < torch.tensor(counts).view(1, -1, 1, 1))
    return tuple(arguments)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(case):
    arguments = make_inputs(case, torch.float16)
    assert_matches_reference(replay(arguments), arguments, *ERRORS)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_order_of_the_warps_races_or_stops(stages):
    # of more steps than twice the buffers, each repeats the barriers of one before
    arguments = make_arguments(range(2 * stages + 3))
    for seed in range(6):
        assert_matches_reference(replay(arguments, seed, stages), arguments, *ERRORS)


def init_for_one(barrier, count):
    barrier.count = barrier.arrivals = 1
    barrier.missing, barrier.phases = 0, 0


def wait_for_another_parity(step, STAGES):
    return step % STAGES, (step // STAGES + 1) & 1


def wait_for_one_parity(step, STAGES):
    return step % STAGES, 0


@pytest.mark.parametrize("fault", ["free", "another", "one"])
def test_a_wrong_protocol_is_noticed(fault, monkeypatch):
    arguments = make_arguments([7])
    changes = {"another": wait_for_another_parity, "one": wait_for_one_parity}
    if fault == "free":
        monkeypatch.setattr(gluon_machine.Barrier, "init", init_for_one)
    names = {"locate": changes[fault]} if fault in changes else {}
    with pytest.raises(AssertionError):
        for seed in range(12):
            assert_matches_reference(replay(arguments, seed, 2, **names), arguments, *ERRORS)


def test_what_the_kernel_does_not_take_is_refused():
    case = Case(dim=64, block_q=128)
    arguments = list(make_inputs(case, torch.float16))
    summaries = make_inputs(dataclasses.replace(case, tail=True), torch.float16)[9]
    for change, words in (
        ({5: torch.zeros(1, 1, 192)}, "neither bias nor tail"),
        ({0: arguments[0].float()}, "bfloat16 and float16 heads"),
        ({7: 64}, "not 64x64"),
        ({1: torch.empty(192 * 64 * 2 + 1).half()[1:].view(1, 2, 192, 64)}, "aligned to 16 bytes"),
        ({9: summaries}, "a tail was given"),
    ):
        changed = dict(enumerate(arguments)) | change
        with pytest.raises(ValueError, match=words):
            gluon.attend(Arguments(*flatten_tail(tuple(changed.values()))))


def test_without_keys_nothing_is_launched():
    arguments = list(make_inputs(Case(dim=64, block_q=128), torch.float16))
    arguments[1], arguments[2] = arguments[1][:, :, :0], arguments[2][:, :, :0]
    out, lse = gluon.attend(Arguments(*arguments))
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())
