"""Every shipped configuration of the block mass compiles for every target, without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.aot import TARGETS, check_builds
from dit_opt.kernels.routers.builds import list_builds, make_build


def test_every_shipped_configuration_compiles_clean():
    builds = [build for target in TARGETS for build in list_builds(target)]
    checked = list(check_builds(builds))
    assert len(checked) == len(builds) >= 50
    faults = [(b.target, b.config, faults) for b, _, faults in checked if faults]
    assert faults == []


def test_builds_of_a_target_are_distinct():
    configs = [build.config for build in list_builds("sm_90")]
    assert len(set(configs)) == len(configs)


def test_the_signature_names_every_argument():
    build = make_build("sm_90", 64, torch.float16)
    assert build.signature["p_q"] == "*fp16" and build.signature["p_mass"] == "*fp32"
    constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
    assert constants == set(build.constexprs)
