"""Variants match the reference, and compile as they were meant for Hopper, which alone has any."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernels.interpreter import INTERPRET, run_cases

pytest.importorskip("triton")

from dit_opt.kernels.aot import TARGETS, check_builds
from dit_opt.kernels.block_sparse_attention.experimental.builds import list_builds


@INTERPRET
def test_variants_match_the_reference(interpret):
    run_cases(Path(__file__).with_name("interpreted_variants.py"), interpret)


def test_only_hopper_has_variants():
    assert [target for target in TARGETS if list(list_builds(target))] == ["sm_90"]


def test_variants_compile_clean():
    builds = list(list_builds("sm_90"))
    assert len({build.config for build in builds}) == len(builds)
    # the largest and the smallest; `benchmarks.lint_kernels` takes all
    builds = [b for b in builds if re.search("D=128 .* 128x128|D=64 .* 128x64", b.config)]
    assert len(builds) == 6
    # in a process of its own, which the compiler may take along
    for build, report, faults in check_builds(builds, processes=1):
        assert faults == [], build.config
        if build.expects_roles:
            # what the copying warps leave to those that attend
            assert report.has_roles and report.registers <= 168
