"""The variants part: only what was right in a process of its own, and here, has a speed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_variants
from benchmarks.gpu_cases import Case
from dit_opt.kernels.block_sparse_attention import block_sparse_attention

CPU = torch.device("cpu")
CASE = Case(64, 300, 2, 0.5)


@pytest.fixture
def stand_ins(monkeypatch):
    """Kernels that are off by a factor each, on a machine where Gluon's process hung."""

    def install(**factors):
        def bind(case, *arguments):
            sizes = {"block_q": case.block_q, "block_k": case.block_k}

            def by(factor):
                return lambda: factor * block_sparse_attention(*arguments, **sizes)[0]

            return {name: by(factor) for name, factor in factors.items()}

        def prove(tiling, dim, tokens, device):
            return "hung" if tiling.variant == "gluon" else ""

        monkeypatch.setattr(gpu_variants, "bind_variants", bind)
        monkeypatch.setattr(gpu_variants, "prove_once", prove)

    return install


def test_only_what_is_right_has_a_speed(stand_ins):
    stand_ins(plain=1.0, gluon=1.0, specialised=1.1, int8=1.015)
    row = gpu_variants.measure_variants(CASE, CPU, 0.0)
    assert set(row["milliseconds"]) == {"sdpa_default", "plain", "int8"}
    assert set(row["speedup_vs_plain"]) == {"sdpa_default", "int8"}
    assert row["failed"].keys() == {"gluon", "specialised"} and row["failed"]["gluon"] == "hung"
    assert "wrong: relative error" in row["failed"]["specialised"]
    assert "gluon" not in row["relative_errors"]


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_beside_a_wrong_plain_kernel_nothing_has_a_speed(stand_ins, factor):
    stand_ins(plain=factor, int8=1.0)
    row = gpu_variants.measure_variants(CASE, CPU, 0.0)
    assert "the plain kernel: wrong" in row["refused"] and "milliseconds" not in row


def test_every_variant_is_bound_by_its_name():
    case = next(iter(gpu_variants.list_cases()))
    inputs = [torch.zeros(1, 1, 1, 1)] * 5
    assert list(gpu_variants.bind_variants(case, *inputs)) == [
        "plain", "gluon", "specialised", "int8",
    ]  # fmt: skip
    assert len(list(gpu_variants.list_cases())) == 8


def test_a_proof_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_variants, "prove", lambda *arguments: asked.append(arguments) or "")
    gpu_variants.prove_once.cache_clear()
    for _ in range(2):
        for case in gpu_variants.list_cases():
            for tiling in gpu_variants._list_tilings(case):
                assert gpu_variants.prove_once(tiling, case.dim, case.tokens, CPU) == ""
    gpu_variants.prove_once.cache_clear()
    # two variants, head dimensions and widths of blocks
    assert len(asked) == 8
    assert all(tiling.tile_k == block_k for tiling, _, _, block_k, *_ in asked)
