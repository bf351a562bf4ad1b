"""Builds compile what a launch passes; `test_shipped_builds` compiles them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.norm_rope.impl.triton.builds import Case, build_case

PAIRS = build_case("sm_90", Case(64, torch.float16, norm="across", table="pair", rows="per head"))
NORM_ONLY = build_case("sm_90", Case(64, torch.float16, table=None))


def test_pointers_have_the_types_of_what_they_stand_for():
    names = ("p_weight", "p_cos", "p_sin", "p_rows", "p_rstd", "p_out")
    for build, types in (
        (PAIRS, ["*fp16", "*fp32", "*fp32", "*i64", "*fp32", "*fp16"]),
        (NORM_ONLY, ["*fp16"] * 6),
    ):
        assert [build.signature[name] for name in names] == types


def test_what_changes_with_the_length_is_not_aligned():
    names = list(PAIRS.signature)
    aligned = {names[position] for (position,) in PAIRS.attrs}
    assert {"p_x", "p_rows", "stride_xn", "stride_cn", "stride_oh"} <= aligned
    # sines are every second column of a table, from the second one on
    assert not aligned & {"tokens", "heads", "group", "rope_start", "stride_rh", "p_sin"}
