"""Configurations tell the compiler what the launcher would; `test_shipped_builds` compiles them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.norm_rope.builds import make_build, make_measure_build

BUILDS = {
    "head": make_build("sm_90", 64, torch.float16),
    "pairs": make_build("sm_90", 64, torch.float16, norm="across", table="pair", rows="per head"),
    "norm only": make_build("sm_90", 64, torch.float16, table=None),
    "measure": make_measure_build("sm_90", 64, torch.float16),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_the_signature_names_every_argument(build):
    constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
    assert constants == set(build.constexprs)
    assert build.signature["p_x"] == "*fp16" and build.signature["eps"] == "fp32"


def test_pointers_have_the_types_of_what_they_stand_for():
    names = ("p_weight", "p_cos", "p_sin", "p_rows", "p_rstd", "p_out")
    for build, types in (
        (BUILDS["pairs"], ["*fp16", "*fp32", "*fp32", "*i64", "*fp32", "*fp16"]),
        (BUILDS["norm only"], ["*fp16"] * 6),
    ):
        assert [build.signature[name] for name in names] == types


def test_what_changes_with_the_length_is_not_aligned():
    build = BUILDS["pairs"]
    names = list(build.signature)
    aligned = {names[position] for (position,) in build.attrs}
    assert {"p_x", "p_rows", "stride_xn", "stride_cn", "stride_oh"} <= aligned
    # sines are every second column of a table, from the second one on
    assert not aligned & {"tokens", "heads", "group", "rope_start", "stride_rh", "p_sin"}
