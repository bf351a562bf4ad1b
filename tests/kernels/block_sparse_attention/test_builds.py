"""Builds compile what a launch passes; `test_shipped_builds` compiles them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.block_sparse_attention.impl.triton.builds import Case, build_case


def test_aligned_16_bit_tiles_come_through_descriptors_on_hopper():
    types = build_case("sm_90", Case(64, torch.float16)).signature
    assert types["p_q"] == "tensordesc<fp16[1, 1, 128, 64]>" and types["p_indices"] == "*i32"
    assert build_case("sm_80", Case(64, torch.float16)).signature["p_q"] == "*fp16"
    assert build_case("sm_90", Case(128, aligned=False)).signature["p_q"] == "*bf16"


def test_without_a_tail_its_arguments_are_constants():
    build = build_case("sm_90", Case(64, torch.float16))
    assert build.constexprs["p_centroids"] is None and not build.constexprs["HAS_TAIL"]
    build = build_case("sm_90", Case(64, torch.float16, tail=True))
    assert build.signature["p_centroids"] == "tensordesc<fp16[1, 1, 64, 64]>"
    assert build.signature["p_log_lengths"] == "*fp32" and build.signature["p_words"] == "*i32"


def test_lengths_of_lists_are_not_specialised():
    build = build_case("sm_90", Case(128, tail=True, bias=True))
    names = list(build.signature)
    aligned = {names[position] for (position,) in build.attrs}
    assert {"p_counts", "p_out", "stride_qn", "stride_ob"} <= aligned
    sizes = {"num_queries", "num_keys", "query_blocks", "capacity", "group", "stride_len_h"}
    assert not aligned & sizes and not sizes & set(build.constexprs)
