"""Every variant compiles for Hopper as it was meant; no other target has any."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from dit_opt.kernels.aot import TARGETS, check_builds
from dit_opt.kernels.block_sparse_attention.variant_builds import list_builds


def test_only_hopper_has_variants():
    assert [target for target in TARGETS if list(list_builds(target))] == ["sm_90"]


def test_every_variant_compiles_clean():
    builds = list(list_builds("sm_90"))
    assert len({build.config for build in builds}) == len(builds) > 0
    # in a process of its own, which the compiler may take along
    for build, report, faults in check_builds(builds, processes=1):
        assert faults == [], build.config
        if build.expects_roles:
            # what the copying warps leave to those that attend
            assert report.has_roles and report.registers <= 168
