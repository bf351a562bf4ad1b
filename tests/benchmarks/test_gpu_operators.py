"""The operators part: the processor agrees with itself, and what is wrong does not pass."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_operators
from benchmarks.gpu_operators import check_moves, check_search, list_checks

CPU = torch.device("cpu")
CHECKS = list_checks()


@pytest.mark.parametrize("name", CHECKS)
def test_the_processor_agrees_with_itself(name):
    assert CHECKS[name](CPU)["passed"]


@pytest.mark.parametrize("name", ["headwise", "adaspa", "rainfusion"])
def test_a_search_that_finds_something_else_fails(name, monkeypatch):
    whole, calls = gpu_operators.list_searches, []

    def list_other(q, k, *arguments):
        calls.append(1)
        # the second one stands for the device
        return whole(q, k.flip(2) if len(calls) == 2 else k, *arguments)

    monkeypatch.setattr(gpu_operators, "list_searches", list_other)
    row = check_search(name, (4, 16, 16), CPU)
    assert not row["passed"] and len(calls) == 2


def test_tokens_that_come_back_elsewhere_fail(monkeypatch):
    ops = torch.ops.ditopt
    scatter = ops.scatter_tokens_v1
    monkeypatch.setattr(ops, "scatter_tokens_v1", lambda x, inverse: scatter(x, inverse).flip(2))
    assert not check_moves((3, 15, 17), CPU)["passed"]
