"""Candidates fit the chip as the compiler sees it, and there are never many."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from dit_opt.kernels.aot import check_build
from dit_opt.kernels.block_sparse_attention.impl.triton.builds import Case, build_case
from dit_opt.kernels.block_sparse_attention.impl.triton.candidates import (
    MOST,
    Demand,
    estimate_demand,
    list_candidates,
    list_variants,
)
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling, choose_tiling

DIMS, BLOCKS = (64, 128), (64, 128)


@pytest.mark.parametrize("dim", [32, *DIMS, 256])
@pytest.mark.parametrize("block_k", BLOCKS)
@pytest.mark.parametrize("block_q", [64, 128])
def test_few_candidates_divide_the_blocks(dim, block_q, block_k):
    found = list_candidates("sm_90", dim, 2, block_q, block_k)
    assert len(set(found)) == len(found) <= MOST
    assert all(block_q % t.tile_q == 0 and block_k % t.tile_k == 0 for t in found)
    # a warp multiplies 16 rows at the least
    assert all(t.tile_q % (16 * t.num_warps) == 0 for t in found)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_tiling_of_the_table_is_among_them(dim):
    assert choose_tiling("sm_90", dim, 2, 128, 64) in list_candidates("sm_90", dim, 2, 128, 64)


@pytest.mark.parametrize(("architecture", "itemsize"), [("sm_80", 2), ("sm_90", 4), ("gfx942", 2)])
def test_nothing_is_known_of_others(architecture, itemsize):
    assert list_candidates(architecture, 128, itemsize, 128, 64) == []


def test_all_candidates_compile_and_take_what_was_estimated():
    found = [
        (dim, block_k, tiling)
        for dim, block_k in itertools.product(DIMS, BLOCKS)
        for tiling in list_candidates("sm_90", dim, 2, 128, block_k)
    ]
    for dim, block_k, tiling in found:
        build = build_case("sm_90", Case(dim, block_k=block_k, tiling=tiling))
        report, faults = check_build(build)
        demand = estimate_demand(tiling, dim)
        assert faults == []
        beyond = report.registers - demand.registers
        assert 0 <= beyond <= demand.spare_registers, (dim, tiling)
        assert report.shared_bytes == pytest.approx(demand.shared, abs=32), (dim, tiling)
        real = Demand(report.registers, report.shared_bytes)
        assert real.occupancy(tiling.num_warps) == demand.occupancy(tiling.num_warps)


def test_what_a_multiprocessor_holds():
    # 138 registers make 144 of each of 256 threads: one program, though memory would hold two
    assert Demand(138, 98304).occupancy(8) == 1
    assert Demand(106, 49152).occupancy(8) == 2
    # here memory is the limit
    assert Demand(64, 100 * 1024).occupancy(4) == 2


def test_the_estimate_of_the_base_configuration():
    demand = estimate_demand(Tiling(128, 64, 8, 3), 128)
    assert (demand.registers, demand.shared // 1024) == (138, 96)


@pytest.mark.parametrize("block_k", BLOCKS)
@pytest.mark.parametrize("dim", DIMS)
def test_variants_are_no_candidates(dim, block_k):
    found = list_variants("sm_90", dim, 2, 128, block_k)
    assert [t.variant for t in found] == ["gluon", "specialised"]
    assert all((t.tile_q, t.tile_k, t.num_warps) == (128, block_k, 4) for t in found)
    plain = list_candidates("sm_90", dim, 2, 128, block_k)
    assert {t.variant for t in plain} == {"plain"}


@pytest.mark.parametrize(
    "sizes",
    [
        ("sm_100", 64, 2, 128, 64), ("sm_90", 32, 2, 128, 64), ("sm_90", 64, 4, 128, 64),
        ("sm_90", 64, 2, 64, 64), ("sm_90", 64, 2, 128, 32),
    ],
)  # fmt: skip
def test_other_sizes_have_no_variants(sizes):
    assert list_variants(*sizes) == []
