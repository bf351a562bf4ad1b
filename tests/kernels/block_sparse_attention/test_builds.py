"""Configurations tell the compiler what the launcher would; `test_shipped_builds` compiles them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.block_sparse_attention.builds import make_build


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
