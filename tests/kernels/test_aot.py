"""Ahead-of-time compilation and the linter, on a kernel small enough to know the answer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels import aot
from dit_opt.kernels.block_sparse_attention.impl.triton.builds import Case, build_case
from dit_opt.kernels.launch import Specialization
from dit_opt.kernels.machine_code import KernelReport, find_misfits, lint

CLEAN = KernelReport(
    target="sm_90", config="", registers=100, spill_bytes=0, shared_bytes=1 << 16,
    wgmma=8, tma_loads=4, mma_sync=0, serialized=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def build():
    return build_case("sm_90", Case(64))


def test_lint_reads_hopper_code(build):
    report, faults = aot.check_build(build)
    assert (report.target, report.config, faults) == ("sm_90", build.config, [])
    assert 64 < report.registers <= 255 and report.spill_bytes == 0
    assert report.wgmma > 0 and report.tma_loads > 0 and report.mma_sync == 0
    # Queries, and keys and values twice each.
    assert report.shared_bytes >= (128 + 4 * 64) * 64 * 2


def test_lint_counts_products_and_copies_of_others():
    report, faults = aot.check_build(build_case("sm_80", Case(64, torch.float16)))
    assert faults == [] and report.mma_sync > 0 and report.wgmma == report.tma_loads == 0
    report, faults = aot.check_build(build_case("sm_100", Case(64, torch.float16)))
    assert faults == [] and report.wgmma > 0 and report.tma_loads > 0 and report.mma_sync == 0


def test_lint_reads_amd_code():
    report, faults = aot.check_build(build_case("gfx942", Case(64, torch.float16)))
    assert report.target == "gfx942" and faults == []
    assert report.mma_sync > 0 and report.registers > 64


def test_lint_sees_spills(build):
    options = {**build.options, "maxnreg": 64}
    compiled = aot.compile_ahead(aot.load_kernel(build), build, aot.TARGETS["sm_90"], **options)
    report = lint(compiled)
    assert report.spill_bytes > 0 or report.serialized
    assert aot.find_faults(build, report) != []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"serialized": ("C7512",)}, "C7512"),
        ({"wgmma": 0}, "HGMMA"),
        ({"tma_loads": 0}, "UTMALDG"),
        ({"mma_sync": 2}, "mma.sync"),
        ({"shared_bytes": 228 * 1024}, "shared memory"),
        ({"misfits": (("128x64", "64x64"),)}, "box of 128x64 into a buffer of 64x64"),
    ],
)
def test_find_faults(build, change, words):
    report = dataclasses.replace(CLEAN, **change)
    faults = aot.find_faults(build, report)
    assert faults == [] if words is None else len(faults) == 1 and words in faults[0]


def test_interpreted_kernels_are_refused():
    def kernel():
        pass

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_ahead(kernel, Specialization({}, {}, {}), aot.TARGETS["sm_90"])


def test_warps_without_roles_are_a_fault_where_they_were_asked_for(build):
    asked = dataclasses.replace(build, expects_roles=True)
    assert aot.find_faults(asked, dataclasses.replace(CLEAN, has_roles=True)) == []
    (fault,) = aot.find_faults(asked, CLEAN)
    assert "no roles" in fault


def test_a_box_that_is_larger_than_its_buffer_is_found():
    line = (
        "ttng.async_tma_copy_global_to_local %q[%row, %c0] %bar, %s, %true : "
        "!tt.tensordesc<tensor<1x1x{}x64xbf16, #shared>>, !ttg.memdesc<1xi64, #b, #smem, mutable> "
        "-> !ttg.memdesc<64x64xbf16, #shared1, #smem, mutable> loc(#loc1)"
    )
    assert find_misfits(line.format(64)) == ()
    assert find_misfits(f"{line.format(64)}\n{line.format(128)}") == (("128x64", "64x64"),)
    with pytest.raises(RuntimeError, match="No box"):
        find_misfits("ttng.async_tma_copy_global_to_local %q : !tt.other<64x64>")


def test_a_build_that_kills_its_process_leaves_the_others(build):
    broken = [
        dataclasses.replace(build, config=name, kernel=f"tests.kernels.broken_kernels:{name}")
        for name in ("raises", "aborts", "hangs")
    ]
    found = list(aot.check_builds(broken, processes=1, seconds=1))
    assert [b.config for b, _, _ in found] == ["raises", "aborts", "hangs"]
    assert found[0][2] == ["does not compile: ValueError: the pass manager failed"]
    assert all("kills the compiler" in fault for _, _, (fault,) in found[1:])
    assert all(report.config == b.config and report.wgmma == 0 for b, report, _ in found)
