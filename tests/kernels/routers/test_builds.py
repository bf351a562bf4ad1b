"""Configurations tell the compiler what the launcher would; `test_shipped_builds` compiles them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.routers.builds import make_build


def test_the_signature_names_every_argument():
    build = make_build("sm_90", 64, torch.float16)
    assert build.signature["p_q"] == "*fp16" and build.signature["p_mass"] == "*fp32"
    constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
    assert constants == set(build.constexprs)
