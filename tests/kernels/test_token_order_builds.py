"""Every shipped configuration of the kernel that moves tokens compiles without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.aot import TARGETS, check_builds
from dit_opt.kernels.token_order_builds import list_builds, make_build


def test_every_shipped_configuration_compiles_clean():
    builds = [build for target in TARGETS for build in list_builds(target)]
    checked = list(check_builds(builds))
    assert len(checked) == len(builds) >= 16
    assert [(b.target, b.config, faults) for b, _, faults in checked if faults] == []
    # rows that are aligned move by whole vectors, which need few addresses
    aligned = [r.registers for build, r, _ in checked if "unaligned" not in build.config]
    assert max(aligned) <= 64


def test_the_signature_names_every_argument():
    build = make_build("sm_90", 64, torch.float16)
    assert build.signature["p_x"] == "*fp16" and build.signature["p_rows"] == "*i64"
    constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
    assert constants == set(build.constexprs)
