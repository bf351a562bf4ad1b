"""`ditopt tune` with a stub in place of the GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from dit_opt import tune
from dit_opt.kernels.block_sparse_attention import tuning

SMALL = tune.Workload(tokens=300, heads=2, density=0.5, dtype=torch.float16)


def test_without_a_gpu_nothing_is_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path))
    with pytest.raises(tune.NothingToTune, match="sees none"):
        tune.tune_kernel([64], SMALL, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_every_shape_is_measured_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(tune.kernel, "read_architecture", lambda device: "sm_90")
    seen = []

    def make_inputs(workload, dim, block_k, device):
        return dim, block_k

    def attend(inputs, tiling):
        seen.append((*inputs, tiling))
        return torch.ones(3)

    monkeypatch.setattr(tune, "make_inputs", make_inputs)
    monkeypatch.setattr(tune, "_attend", attend)
    # the last candidate is the fastest
    times = (0.5**i for i in itertools.count())
    monkeypatch.setattr(tune, "_measure", lambda call: next(times))
    trials, file = tune.tune_kernel([64, 128], SMALL, torch.device("cuda"))
    assert len(trials) == 4 and {s[:2] for s in seen} == {
        (d, b) for d in (64, 128) for b in (64, 128)
    }
    for key, found in trials.items():
        assert tuning._read(file)[key] == found[-1].tiling


def test_a_card_without_candidates_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(tune.kernel, "read_architecture", lambda device: "sm_80")
    with pytest.raises(tune.NothingToTune, match="an old card"):
        tune.tune_kernel([64], SMALL, torch.device("cuda"))


def test_inputs_keep_about_the_asked_share():
    inputs = tune.make_inputs(SMALL, 32, 64, torch.device("cpu"))
    assert inputs.q.shape == (1, 2, 300, 32) and inputs.q.transpose(1, 2).is_contiguous()
    assert inputs.counts.shape == (1, 2, 3) and inputs.indices.shape == (1, 2, 3, 5)
    assert 0.2 < float(inputs.counts.float().mean()) / 5 < 0.9 and int(inputs.counts.min()) >= 1
