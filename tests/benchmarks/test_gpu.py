"""The one command for the GPU: it goes on where it stopped, and says what is missing."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import Case
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling
from dit_opt.kernels.block_sparse_attention.impl.triton.tuning import Trial

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """A part of two rows, of which the second fails at first."""
    calls = []

    def fail():
        calls.append("second")
        raise ValueError("out of shared memory\nmore of it")

    def succeed():
        calls.append("first")
        return {"passed": True}

    monkeypatch.setattr(gpu, "list_rows", lambda *_: {"first": succeed, "second": fail})
    return calls


def test_every_part_names_its_rows():
    for part in gpu.HEADERS:
        assert len(gpu.list_rows(part, CPU)) >= 1
    assert len(gpu.list_rows("attention", CPU)) > 20
    assert set(gpu.LIMITS) == set(gpu.HEADERS)
    # parts that bars need come before the rest, and end in time
    needed = ("correctness", "operators", "ceilings", "attention", "routers")
    assert sum(gpu.LIMITS[part] for part in needed) < 400


def test_a_row_of_tilings_has_the_time_of_each_candidate(monkeypatch):
    trials = [Trial(Tiling(128, 64, 8, 3), 1.5), Trial(Tiling(64, 64, 4, 3), None, "wrong")]
    key = "card | triton 3 | kernel 0 | D=64 bfloat16 128x64"
    monkeypatch.setattr(gpu, "tune_kernel", lambda dims, *_: ({key: trials}, Path("file")))
    assert gpu.list_rows("tilings", CPU)["D=64"]() == {
        "milliseconds": {"128x64 tile 128x64 warps 8 stages 3": 1.5},
        "refusals": {"128x64 tile 64x64 warps 4 stages 3": "wrong"},
        "trials": {key: [dataclasses.asdict(trial) for trial in trials]},
        "file": "file",
    }


def write(out, part, **row):
    with (out / gpu.ROWS).open("a") as stream:
        stream.write(json.dumps({"part": part, "case": "a"} | row) + "\n")


def test_rows_are_written_one_by_one_and_not_measured_twice(small, tmp_path):
    write(tmp_path, "attention", case="first", eta=0.8)
    for _ in range(2):
        gpu.run_part("correctness", tmp_path, CPU)
    # what was refused is tried again, and has one row
    assert small == ["first", "second", "second"]
    rows = gpu.read_rows(tmp_path, "correctness")
    assert [(row["case"], row.get("passed"), row.get("refused")) for row in rows] == [
        ("first", True, None),
        ("second", None, "ValueError: out of shared memory"),
    ]
    assert all(row["at"].endswith("Z") for row in rows)
    assert gpu.read_rows(tmp_path, "attention")[0]["eta"] == 0.8


def test_what_was_not_tried_comes_before_what_was_refused(small, tmp_path):
    write(tmp_path, "correctness", case="second", refused="an illegal access")
    write(tmp_path, "correctness", case="first", refused="an illegal access")
    gpu.run_part("correctness", tmp_path, CPU)
    assert small == ["first", "second"]
    (tmp_path / gpu.ROWS).unlink()
    write(tmp_path, "correctness", case="first", refused="an illegal access")
    gpu.run_part("correctness", tmp_path, CPU)
    assert small[2:] == ["second", "first"]


def test_only_named_rows_are_measured(small, tmp_path):
    gpu.run_part("correctness", tmp_path, CPU, only="fir")
    assert small == ["first"]


def test_a_part_that_dies_goes_on_while_it_adds_rows(monkeypatch, tmp_path, capsys):
    def die():
        os._exit(11)

    def list_rows(*_):
        return {"a": lambda: {"passed": True}, "b": die, "c": lambda: {"passed": True}}

    monkeypatch.setattr(gpu, "list_rows", list_rows)
    options = ["--out", str(tmp_path), "--device", "cpu", "--parts", "correctness"]
    assert gpu.main(options) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["case"] for row in report["rows"]["correctness"]] == ["a"]
    assert "status 11" in report["incomplete"]["correctness"]
    printed = capsys.readouterr()
    assert "correctness is not complete" in printed.err and "True" in printed.out


def test_a_part_that_hangs_leaves_time_for_the_next(monkeypatch, tmp_path):
    def list_rows(part, _):
        wait = 60 if part == "operators" else 0
        return {"a": lambda: time.sleep(wait) or {"passed": True}}

    monkeypatch.setattr(gpu, "list_rows", list_rows)
    monkeypatch.setitem(gpu.LIMITS, "operators", 0.5)
    stopped = gpu.run_parts(["operators", "correctness"], tmp_path, "cpu", minutes=1.0)
    assert "time is over" in stopped["operators"] and list(stopped) == ["operators"]
    assert gpu.read_rows(tmp_path, "correctness")[0]["passed"]


@pytest.mark.parametrize(
    ("part", "row", "status"),
    [
        ("correctness", {"passed": True}, 0),
        ("correctness", {"passed": False}, 1),
        ("attention", {"eta": 0.8}, 0),
        ("attention", {"refused": "wrong: relative error 0.2"}, 1),
    ],
)
def test_a_wrong_result_fails_the_command(monkeypatch, tmp_path, part, row, status):
    monkeypatch.setattr(gpu, "run_parts", lambda *_: {})
    write(tmp_path, part, **row)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--parts", part]) == status


def test_a_part_runs_in_a_process_of_its_own(monkeypatch, tmp_path):
    stopped = gpu.run_parts(["ceilings"], tmp_path, "cpu", minutes=0.0)
    assert "time is over" in stopped["ceilings"]
    small = {"float32": (Case(16, 300, 1, 0.5),), "bfloat16": (Case(16, 300, 1, 0.5, masked=True),)}
    monkeypatch.setattr(gpu, "CHECKED", small)
    # a fork of a process that has used its threads would wait for them
    gpu.run_part("correctness", tmp_path, CPU)
    rows = gpu.read_rows(tmp_path, "correctness")
    assert len(rows) == 2 and all(row["passed"] for row in rows)


def test_a_dry_run_lists_and_compiles_but_measures_nothing(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(gpu, "check_builds", lambda builds: compiled.extend(builds) or [])
    assert gpu.main(["--dry-run", "--parts", "routers", "models", "variants", "prologue"]) == 0
    printed = capsys.readouterr().out
    assert "16x32x64" in printed and "HunyuanVideo 1+1 layers" in printed
    assert "D=128 N=32760 H=24 density=0.25 128x128" in printed and "Wan 14B N=75600" in printed
    configs = [build.config for build in compiled]
    for word in ("gluon", "specialised", "int8", "quantize", "norm rope"):
        assert any(word in config for config in configs), word
    assert len(compiled) > 30 and {build.target for build in compiled} == {"sm_90"}
