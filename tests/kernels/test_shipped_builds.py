"""Every shipped configuration of every kernel compiles for every target, without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from dit_opt.kernels.aot import TARGETS, check_build
from dit_opt.kernels.block_sparse_attention.impl.triton import builds as attention_builds
from dit_opt.kernels.norm_rope.impl.triton import builds as norm_rope_builds
from dit_opt.kernels.searches import builds as search_builds
from dit_opt.kernels.token_order.impl.triton import builds as token_order_builds

LISTS = {
    "attention": attention_builds.list_builds,
    "searches": search_builds.list_builds,
    "norm rope": norm_rope_builds.list_builds,
    "token order": token_order_builds.list_builds,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernels", LISTS)
def test_every_configuration_compiles_clean(kernels, target):
    builds = list(LISTS[kernels](target))
    assert len({build.config for build in builds}) == len(builds)
    for build in builds:
        report, faults = check_build(build)
        assert (build.target, build.config, faults) == (target, report.config, [])
        if build.expects_wgmma:
            assert report.wgmma > 0 and report.tma_loads > 0
        if kernels == "token order" and "unaligned" not in build.config:
            # rows that are aligned move by whole vectors, which need few addresses
            assert report.registers <= 64
        if kernels == "norm rope":
            # six programs side by side, or too few loads are under way to keep memory busy
            assert report.registers <= 80


def test_every_branch_of_attention_is_compiled():
    builds = [b.constexprs for b in attention_builds.list_builds("sm_90") if "DIM" in b.constexprs]
    for name in ("HAS_BIAS", "RAGGED_KEYS", "HAS_TAIL", "USE_DESCRIPTORS"):
        assert {bool(constants[name]) for constants in builds} == {False, True}, name
    assert {(c["HAS_BIAS"], c["HAS_TAIL"]) for c in builds} == {
        (bias, tail) for bias in (False, True) for tail in (False, True)
    }
    assert {c["PADDED_DIM"] for c in builds} == {32, 64, 128, 256}
    assert {c["BLOCK_K"] // c["TILE_K"] > 1 for c in builds} == {False, True}


def test_every_branch_of_the_searches_is_compiled():
    builds = [b.constexprs for b in search_builds.list_builds("sm_90")]
    for name in ("HAS_BIAS", "RAGGED", "PACKED", "IS_FIRST", "IS_LAST", "REPEATS"):
        assert {c[name] for c in builds if name in c} == {False, True}, name


def test_every_branch_of_the_prologue_is_compiled():
    builds = [b.constexprs for b in norm_rope_builds.list_builds("sm_90") if "ROPE" in b.constexprs]
    branches = ("HAS_NORM", "HAS_WEIGHT", "ACROSS", "ROPE", "HALVES", "PER_PAIR")
    for name in (*branches, "HAS_ROWS", "PER_HEAD"):
        assert {c[name] for c in builds} == {False, True}, name
    assert {c["PADDED_HALF"] * 2 == c["DIM"] for c in builds} == {False, True}
