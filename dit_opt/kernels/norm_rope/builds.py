"""Every configuration of the attention prologue that ships, ready for compilation ahead of time.

Mirrors what `norm_rope.triton` would compile on first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import triton

from dit_opt.kernels.aot import Build
from dit_opt.kernels.norm_rope import triton as _launcher

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ALIGNED = [["tt.divisibility", 16]]
# The launcher leaves these as they come.
_NOT_SPECIALISED = ("stride_rb", "stride_rh")


def make_build(
    target: str,
    dim: int,
    dtype: torch.dtype,
    *,
    norm: Literal["head", "across"] | None = "head",
    table: Literal["channel", "pair"] | None = "channel",
    halves: bool = False,
    rows: Literal["shared", "per head"] | None = None,
) -> Build:
    """One configuration: a norm has weights, and factors of pairs are every second of a table."""
    kernel = _launcher.norm_rope_kernel
    padded_half = triton.next_power_of_2(triton.cdiv(dim, 2))
    constexprs = {
        "HAS_NORM": norm is not None,
        "HAS_WEIGHT": norm is not None,
        "ACROSS": norm == "across",
        "ROPE": table is not None,
        "HALVES": halves,
        "PER_PAIR": table == "pair",
        "HAS_ROWS": rows is not None,
        "PER_HEAD": rows == "per head",
        "STRIDE_CD": 2 if table == "pair" else 1,
        "STRIDE_SD": 2 if table == "pair" else 1,
        "DIM": dim,
        "PADDED_HALF": padded_half,
        "TILE": _launcher.choose_tile(2 * padded_half),
        # The launcher turns an integer argument of 1 into a constant.
        "stride_xd": 1,
    }
    if rows is not None:
        constexprs["stride_rn"] = 1
    # What is missing is stood for by x.
    pointers = dict.fromkeys(_list_pointers(kernel), f"*{_NAMES[dtype]}")
    if table is not None:
        pointers |= dict.fromkeys(("p_cos", "p_sin"), "*fp32")
    if rows is not None:
        pointers["p_rows"] = "*i64"
    if norm == "across":
        pointers["p_rstd"] = "*fp32"
    # The sines of a table of which every second column is read begin at its second.
    unaligned = {"p_sin"} if table == "pair" else set()
    parts = [f"norm rope D={dim} {_NAMES[dtype]}"]
    parts += [f"norm {norm}"] if norm else []
    parts += [f"factors by {table}"] if table else []
    parts += ["halves"] if halves else []
    parts += [f"rows {rows}"] if rows else []
    return _make(target, kernel, " ".join(parts), pointers, constexprs, unaligned)


def make_measure_build(target: str, dim: int, dtype: torch.dtype) -> Build:
    """The kernel that measures tokens across their heads."""
    kernel = _launcher.measure_rows_kernel
    padded_dim = triton.next_power_of_2(dim)
    constexprs = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "TILE": _launcher.choose_tile(padded_dim),
        "stride_xd": 1,
    }
    pointers = {"p_x": f"*{_NAMES[dtype]}", "p_rstd": "*fp32"}
    config = f"norm rope measure D={dim} {_NAMES[dtype]}"
    return _make(target, kernel, config, pointers, constexprs, set())


def list_builds(target: str) -> Iterator[Build]:
    """The shipped configurations for one target: what models need, and every branch."""
    bf16 = torch.bfloat16
    yield make_build(target, 128, bf16)
    yield make_build(target, 128, bf16, norm="across", table="pair")
    yield make_build(target, 128, bf16, norm="across", table="pair", rows="per head")
    yield make_build(target, 64, bf16, halves=True)
    yield make_build(target, 64, bf16, table=None)
    yield make_build(target, 80, torch.float16, norm=None, rows="per head")
    yield make_build(target, 128, torch.float32, rows="shared")
    yield make_measure_build(target, 128, bf16)


def _list_pointers(kernel: triton.JITFunction) -> list[str]:
    return [name for name in kernel.arg_names if name.startswith("p_")]


def _make(
    target: str,
    kernel: triton.JITFunction,
    config: str,
    pointers: dict[str, str],
    constexprs: dict[str, object],
    unaligned: set[str],
) -> Build:
    """A build whose pointers and strides are aligned, but for `unaligned` ones."""
    types = {"eps": "fp32"} | pointers | dict.fromkeys(constexprs, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    excluded = {*unaligned, *constexprs, *_NOT_SPECIALISED}
    return Build(
        config=config,
        target=target,
        kernel=f"{_launcher.__name__}:{kernel.__name__}",
        signature=signature,
        constexprs=constexprs,
        attrs={
            (position,): _ALIGNED
            for position, name in enumerate(kernel.arg_names)
            if name.startswith(("p_", "stride_")) and name not in excluded
        },
        options={"num_warps": _launcher.WARPS},
    )
