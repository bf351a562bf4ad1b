"""Every build is that of a launch, and launches and kernels agree about the arguments."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.lint_kernels import LISTS
from dit_opt.kernels.aot import TARGETS, load_kernel


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("list_builds", LISTS, ids=lambda listed: listed.__module__)
def test_builds_name_every_parameter_of_their_kernel(list_builds, target):
    for build in list_builds(target):
        assert build.target == target
        assert list(build.signature) == load_kernel(build).arg_names
        constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
        assert constants == set(build.constexprs)


def test_what_tells_builds_apart_is_in_their_names():
    builds = [(build.target, build.config) for t in TARGETS for lb in LISTS for build in lb(t)]
    assert len(set(builds)) == len(builds)
