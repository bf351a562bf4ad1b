"""Launches of the attention prologue's kernels, for the linter to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from dit_opt.kernels.aot import Build, make_build, make_meta
from dit_opt.kernels.launch import TYPE_NAMES
from dit_opt.kernels.norm_rope.contract import Arguments
from dit_opt.kernels.norm_rope.impl.triton.prologue import prepare, prepare_measure
from dit_opt.kernels.norm_rope.reference import new_output

# Sizes that Triton specialises for nothing, as most are.
_TOKENS, _HEADS = 1001, 6


@dataclass(frozen=True)
class Case:
    """One configuration: a norm has weights, and factors of pairs are every second of a table."""

    dim: int
    dtype: torch.dtype = torch.bfloat16
    norm: Literal["head", "across"] | None = "head"
    table: Literal["channel", "pair"] | None = "channel"
    halves: bool = False
    rows: Literal["shared", "per head"] | None = None

    def __str__(self) -> str:
        parts = [f"norm rope D={self.dim} {TYPE_NAMES[self.dtype]}"]
        parts += [f"norm {self.norm}"] if self.norm else []
        parts += [f"factors by {self.table}"] if self.table else []
        parts += ["halves"] if self.halves else []
        parts += [f"rows {self.rows}"] if self.rows else []
        return " ".join(parts)


CASES = (
    Case(128),
    Case(128, norm="across", table="pair"),
    Case(128, norm="across", table="pair", rows="per head"),
    Case(64, halves=True),
    Case(64, table=None),
    Case(80, torch.float16, norm=None, rows="per head"),
    Case(128, torch.float32, rows="shared"),
)


def build_case(target: str, case: Case) -> Build:
    """The launch of a case on meta tensors."""
    x = make_meta(1, _TOKENS, _HEADS, case.dim, dtype=case.dtype)
    weight = rstd = cos = sin = rows = None
    if case.norm is not None:
        size = case.dim * (_HEADS if case.norm == "across" else 1)
        weight = make_meta(size, dtype=case.dtype)
    if case.norm == "across":
        rstd = make_meta(1, _TOKENS)
    if case.table is not None:
        cos = sin = make_meta(_TOKENS, case.dim)
        if case.table == "pair":
            cos, sin = cos[:, ::2], sin[:, 1::2]
    if case.rows is not None:
        rows = make_meta(1, _HEADS, _TOKENS, dtype=torch.int64)
        rows = rows[:, :1].expand(1, _HEADS, _TOKENS) if case.rows == "shared" else rows
    eps, across = -1.0 if case.norm is None else 1e-6, case.norm == "across"
    call = Arguments(x, weight, eps, across, cos, sin, case.halves, 0, rows)
    return make_build(target, prepare(call, rstd, new_output(x, rows)), str(case))


def list_builds(target: str) -> Iterator[Build]:
    """The shipped configurations for one target: what models need, and every branch."""
    for case in CASES:
        yield build_case(target, case)
    x = make_meta(1, _TOKENS, _HEADS, 128, dtype=torch.bfloat16)
    launch = prepare_measure(x, 1e-6, make_meta(1, _TOKENS))
    yield make_build(target, launch, "norm rope measure D=128 bf16")
