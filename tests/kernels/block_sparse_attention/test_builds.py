"""Every shipped configuration compiles for every target, without spills, without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.aot import TARGETS, check_builds
from dit_opt.kernels.block_sparse_attention.builds import list_builds, make_build


def test_every_shipped_configuration_compiles_clean():
    builds = [build for target in TARGETS for build in list_builds(target)]
    checked = list(check_builds(builds))
    assert len(checked) == len(builds) >= 60
    faults = [(b.target, b.config, faults) for b, _, faults in checked if faults]
    assert faults == []
    hopper = [report for build, report, _ in checked if build.expects_wgmma]
    assert hopper and all(r.wgmma > 0 and r.tma_loads > 0 for r in hopper)


def test_builds_of_a_target_are_distinct():
    configs = [build.config for build in list_builds("sm_90")]
    assert len(set(configs)) == len(configs)


def test_the_signature_names_every_argument():
    build = make_build("sm_90", 64, torch.float16)
    assert build.signature["p_q"] == "tensordesc<fp16[1, 1, 128, 64]>"
    assert build.signature["p_indices"] == "*i32"
    constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
    assert constants == set(build.constexprs)


def test_without_a_tail_its_arguments_are_constants():
    build = make_build("sm_90", 64, torch.float16)
    assert build.constexprs["p_centroids"] is None and not build.constexprs["HAS_TAIL"]
    build = make_build("sm_90", 64, torch.float16, tail=True)
    assert build.signature["p_centroids"] == "tensordesc<fp16[1, 1, 64, 64]>"
    assert build.signature["p_log_lengths"] == "*fp32" and build.signature["p_words"] == "*i32"
