"""The kernel linter's command line: table, JSON and exit status."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks import lint_kernels
from dit_opt.kernels.machine_code import KernelReport


def fake_check(faults):
    def check(builds, processes):
        for build in builds:
            yield build, KernelReport(build.target, build.config, 1, 0, 2, 3, 4, 5, ()), faults

    return check


@pytest.mark.parametrize(("faults", "status"), [([], 0), (["spills 4 bytes"], 1)])
def test_exit_status_and_json(monkeypatch, tmp_path, capsys, faults, status):
    monkeypatch.setattr(lint_kernels, "check_builds", fake_check(faults))
    file = tmp_path / "kernels.json"
    assert lint_kernels.main(["--targets", "sm_90", "gfx942", "--json", str(file)]) == status
    kernels = json.loads(file.read_text())["kernels"]
    assert {row["target"] for row in kernels} == {"sm_90", "gfx942"}
    assert all(row["faults"] == faults for row in kernels)
    assert any("gluon" in row["config"] for row in kernels)
    printed = capsys.readouterr().out
    assert kernels[0]["config"] in printed and "shared (B)" in printed
