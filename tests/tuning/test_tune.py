"""`ditopt tune` with a stub in place of the GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.block_sparse_attention.impl.triton import tuning
from dit_opt.tuning import tune

SMALL = tune.Workload(tokens=300, heads=2, density=0.5, dtype=torch.float16)


def test_without_a_gpu_nothing_is_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path))
    with pytest.raises(tune.NothingToTune, match="sees none"):
        tune.tune_kernel([64], SMALL, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_variants", [False, True])
def test_every_shape_is_measured_and_kept(tmp_path, monkeypatch, with_variants):
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(tune, "read_architecture", lambda device: "sm_90")
    seen = []

    def make_inputs(workload, dim, block_k, device):
        return dim, block_k

    def attend(inputs, tiling):
        seen.append((*inputs, tiling))
        return torch.ones(3), torch.ones(3)

    monkeypatch.setattr(tune, "make_inputs", make_inputs)
    monkeypatch.setattr(tune, "attend", attend)
    asked = []

    def prove(tiling, workload, dim, block_k, device):
        asked.append((dim, block_k, tiling.variant))
        return "hung" if tiling.variant == "gluon" else ""

    monkeypatch.setattr(tune, "prove", prove)
    # the last candidate is the fastest
    times = (0.5**i for i in itertools.count())
    monkeypatch.setattr(tune, "_measure", lambda call: next(times))
    trials, file = tune.tune_kernel([64, 128], SMALL, torch.device("cuda"), with_variants)
    assert len(trials) == 4 and {s[:2] for s in seen} == {
        (d, b) for d in (64, 128) for b in (64, 128)
    }
    kept = tuning._read()
    assert file.parent == tmp_path and len(kept) == 4
    for key, found in trials.items():
        timed = [t for t in found if t.milliseconds is not None]
        assert kept[key] == timed[-1].tiling
        assert kept[key].variant == ("specialised" if with_variants else "plain")
        assert [t.refused for t in found if t not in timed] == (["hung"] if with_variants else [])
    assert len(asked) == (8 if with_variants else 0)
    # what hung there is not run here
    assert not any(tiling.variant == "gluon" for *_, tiling in seen)


def test_padded_heads_have_no_variants(tmp_path, monkeypatch):
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(tune, "read_architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "make_inputs", lambda *_: None)
    monkeypatch.setattr(tune, "attend", lambda *_: (torch.ones(3), torch.ones(3)))
    monkeypatch.setattr(tune, "_measure", lambda call: 1.0)
    monkeypatch.setattr(tune, "prove", lambda *_: pytest.fail("tried"))
    trials, _ = tune.tune_kernel([80], SMALL, torch.device("cuda"), with_variants=True)
    assert len(trials) == 2


def test_a_card_without_candidates_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(tune, "read_architecture", lambda device: "sm_80")
    with pytest.raises(tune.NothingToTune, match="an old card"):
        tune.tune_kernel([64], SMALL, torch.device("cuda"))


def test_a_dimension_without_candidates_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(tune, "read_architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "make_inputs", lambda *_: pytest.fail("measured"))
    with pytest.raises(tune.NothingToTune, match="heads of 300"):
        tune.tune_kernel([64, 300], SMALL, torch.device("cuda"))


def test_inputs_keep_the_asked_share_in_rows_that_differ():
    inputs = tune.make_inputs(SMALL, 32, 64, torch.device("cpu"))
    assert inputs.q.shape == (1, 2, 300, 32) and inputs.q.transpose(1, 2).is_contiguous()
    assert inputs.counts.shape == (1, 2, 3) and inputs.indices.shape == (1, 2, 3, 5)
    longer = tune.Workload(tokens=16000, heads=2, density=0.5, dtype=torch.float16)
    counts = tune.make_inputs(longer, 16, 64, torch.device("cpu")).counts.float() / 250
    assert float(counts.mean()) == pytest.approx(0.5, abs=0.03)
    # shares are even between 0.4 and 1.6 times the mean
    assert float(counts.std()) == pytest.approx(0.3 / 3**0.5, abs=0.03)
    again = tune.make_inputs(longer, 16, 64, torch.device("cpu")).counts.float() / 250
    assert torch.equal(counts, again)


def test_key_heads_may_be_fewer():
    shared = dataclasses.replace(SMALL, heads=4, key_heads=2)
    inputs = tune.make_inputs(shared, 32, 64, torch.device("cpu"))
    assert inputs.q.shape[1] == 4 and inputs.k.shape == inputs.v.shape == (1, 2, 300, 32)
