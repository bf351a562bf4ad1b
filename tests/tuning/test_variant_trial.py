"""A variant runs in a process of its own first, and what goes wrong there is said, not shared."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling
from dit_opt.tuning import variant_trial
from dit_opt.tuning.inputs import Workload

CPU = torch.device("cpu")
SMALL = Workload(tokens=200, heads=1, density=0.5, dtype=torch.float16)
SPECIALISED = Tiling(128, 64, 4, 2, "specialised")


def test_a_right_variant_has_no_reason_against_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert variant_trial.prove(SPECIALISED, SMALL, 64, 64, CPU) == ""


def test_a_process_that_hangs_is_ended():
    reason = variant_trial.prove(SPECIALISED, SMALL, 64, 64, CPU, seconds=0.05)
    assert reason == "did not end within 0.05 seconds"


@pytest.mark.parametrize("stderr", ["", "Traceback\nan illegal memory access\n"])
def test_a_process_that_dies_is_named(monkeypatch, stderr):
    died = SimpleNamespace(returncode=-6, stdout="", stderr=stderr)
    monkeypatch.setattr(variant_trial.subprocess, "run", lambda *_, **__: died)
    reason = variant_trial.prove(SPECIALISED, SMALL, 64, 64, CPU)
    assert reason.startswith("its process ended with status -6: ")
    assert reason.endswith("an illegal memory access" if stderr else "nothing was said")


@pytest.mark.parametrize(
    ("wrong", "run", "reason"),
    [
        ((1.1, 1.0), 1, "its output is 0.1 off in run 1 of 20"),
        ((torch.nan, 1.0), 3, "its output is nan off in run 3 of 20"),
        ((1.0, 1.1), 2, "its log-sum-exp is 0.1 off in run 2 of 20"),
        ((1.0, -torch.inf), 2, "its log-sum-exp is -inf elsewhere in run 2 of 20"),
        # the second and the third call have other shapes
        ((1.1, 1.0), 21, "its output is 0.1 off in run 1 of 20 with {'tokens': 256}"),
        ((1.1, 1.0), 60, "its output is 0.1 off in run 20 of 20 with {'key_heads': 1}"),
    ],
)
def test_every_run_must_be_right(monkeypatch, capsys, wrong, run, reason):
    runs, lengths = [], []

    def attend(inputs, tiling):
        if tiling.variant == "plain":
            lengths.append(inputs.counts[0, 0].tolist())
            return torch.ones(4), torch.ones(4)
        runs.append(tiling)
        return tuple(torch.full((4,), x if len(runs) == run else 1.0) for x in wrong)

    monkeypatch.setattr(variant_trial, "attend", attend)
    sent = []

    def ask(command, **_):
        sent.append(command[-1])
        return SimpleNamespace(returncode=0, stdout="\n", stderr="")

    monkeypatch.setattr(subprocess, "run", ask)
    assert variant_trial.prove(SPECIALISED, SMALL, 64, 64, CPU) == ""
    # what the process would do with this request
    variant_trial.main(sent)
    assert capsys.readouterr().out == f"{reason}\n"
    # lists that are empty, or shorter than what is buffered, come first
    assert lengths[0] == [0, 1]
    assert runs == [SPECIALISED] * run and json.loads(sent[0])["workload"]["tokens"] == 200
