"""Every configuration of the routers' kernels that ships, ready for compilation ahead of time.

Mirrors what `block_mass_triton`, `sampled_mass_triton`, `packing_triton` and `thresholds_triton`
would compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from triton.runtime import JITFunction

from dit_opt.kernels.aot import Build
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import (
    Tiling,
    choose_precision,
    pad_dim,
)
from dit_opt.kernels.routers import block_mass_triton as _launcher
from dit_opt.kernels.routers import packing_triton as _packing
from dit_opt.kernels.routers import sampled_mass_triton as _sampled
from dit_opt.kernels.routers import thresholds_triton as _thresholds
from dit_opt.kernels.routers.block_mass import STALE_LIMIT

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def make_build(
    target: str,
    dim: int,
    dtype: torch.dtype,
    block_q: int = 128,
    block_k: int = 64,
    *,
    ragged: bool = True,
    bias: bool = False,
    cached: bool = False,
) -> Build:
    """One configuration; `cached` is the one pass of a search with an earlier log-sum-exp."""
    kernel = _launcher.block_mass_kernel
    padded_dim = pad_dim(dim)
    tiling = _launcher.choose_mass_tiling(
        target, padded_dim, dtype.itemsize, block_q, block_k, crowded=bias and cached
    )
    constexprs = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "BLOCK_Q": block_q,
        "TILE_Q": tiling.tile_q,
        "TILE_K": tiling.tile_k,
        "HAS_BIAS": bias,
        "HAS_LSE": cached,
        "RAGGED": ragged,
        "STALE_LIMIT": STALE_LIMIT,
        "PRECISION": choose_precision(target, padded_dim, dtype.itemsize),
    }
    config = (
        f"block mass D={dim} {_NAMES[dtype]} block {block_q}x{block_k} {_describe(tiling)}"
        + (" ragged" if ragged else "")
        + (" bias" if bias else "")
        + (" cached" if cached else "")
    )
    return _make(config, target, _launcher, kernel, constexprs, tiling, dtype)


def make_sample_build(
    target: str,
    kernel: JITFunction[Any],
    dim: int,
    dtype: torch.dtype,
    block_k: int = 64,
    *,
    ragged: bool = True,
    bias: bool = False,
) -> Build:
    """One configuration of either kernel of `sampled_mass_triton`."""
    padded_dim = pad_dim(dim)
    tiling = _sampled.choose_sample_tiling(target, padded_dim, dtype.itemsize, block_k, bias)
    constexprs = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "TILE_Q": tiling.tile_q,
        "TILE_K": tiling.tile_k,
        "HAS_BIAS": bias,
        "RAGGED": ragged,
        "PRECISION": choose_precision(target, padded_dim, dtype.itemsize),
    }
    config = (
        f"{kernel.__name__.removesuffix('_kernel').replace('_', ' ')} D={dim} {_NAMES[dtype]} "
        f"block {block_k} {_describe(tiling)}"
        + (" ragged" if ragged else "")
        + (" bias" if bias else "")
    )
    return _make(config, target, _sampled, kernel, constexprs, tiling, dtype)


def _describe(tiling: Tiling) -> str:
    tile = f"tile {tiling.tile_q}x{tiling.tile_k}"
    return f"{tile} warps {tiling.num_warps} stages {tiling.num_stages}"


def _make(
    config: str,
    target: str,
    module: ModuleType,
    kernel: JITFunction[Any],
    constexprs: dict[str, object],
    tiling: Tiling,
    dtype: torch.dtype,
) -> Build:
    """The build of a kernel that reads aligned queries and keys."""
    # The launcher turns an integer argument of 1 into a constant.
    constexprs = constexprs | {"stride_qd": 1, "stride_kd": 1}
    signature = {
        argument: _type_of(argument, _NAMES[dtype], constexprs) for argument in kernel.arg_names
    }
    attrs = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
        or (argument.startswith("stride_") and argument not in constexprs)
    }
    return Build(
        config=config,
        target=target,
        kernel=f"{module.__name__}:{kernel.__name__}",
        signature=signature,
        constexprs=constexprs,
        attrs=attrs,
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
    )


def make_average_build(target: str, tiles: int) -> Build:
    """The kernel of means over sampled rows."""
    kernel = _sampled.average_rows_kernel
    constexprs = {"TILES": tiles, "COLUMNS": _sampled.COLUMNS, "RUN": _sampled.RUN}
    pointers = dict.fromkeys(("p_first", "p_last"), "*i32")
    pointers |= dict.fromkeys(("p_shares", "p_mass"), "*fp32")
    return Build(
        config=f"average rows {tiles} tiles",
        target=target,
        kernel=f"{_sampled.__name__}:{kernel.__name__}",
        signature={
            name: "constexpr" if name in constexprs else pointers.get(name, "i32")
            for name in kernel.arg_names
        },
        constexprs=constexprs,
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(kernel.arg_names)
            if name in ("p_shares", "p_first", "p_last")
        },
        options={"num_warps": 4},
    )


def make_list_build(target: str, packed: bool) -> Build:
    """The kernel that makes lists of packed plans, or of block masks."""
    kernel = _packing.list_blocks_kernel
    kept = {"p_kept": "*i32" if packed else "*u8"}
    pointers = kept | dict.fromkeys(("p_counts", "p_indices"), "*i32")
    constexprs = {"PACKED": packed, "CHUNK": _packing.CHUNK}
    return Build(
        config=f"list {'packed' if packed else 'masked'} blocks chunk {_packing.CHUNK}",
        target=target,
        kernel=f"{_packing.__name__}:{kernel.__name__}",
        signature=pointers
        | dict.fromkeys(("blocks", "width", "capacity"), "i32")
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        attrs={(position,): [["tt.divisibility", 16]] for position in range(len(pointers))},
    )


def make_threshold_build(target: str, place: str, within: bool, repeats: bool) -> Build:
    """One launch of a search for a threshold: the "first", a "middle" or the "last" one."""
    kernel = _thresholds.sum_above_kernel
    constexprs = {
        "IS_FIRST": place == "first",
        "IS_LAST": place == "last",
        "WITHIN": within,
        "REPEATS": repeats,
        "PARTS": _thresholds.PARTS,
        "CHUNK": _thresholds.CHUNK,
    }
    pointers = dict.fromkeys(("p_low", "p_next"), "*i32") | dict.fromkeys(
        ("p_scores", "p_gains", "p_target", "p_parts", "p_sums"), "*fp32"
    )
    signature = {
        name: "constexpr" if name in constexprs else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    return Build(
        config=f"threshold {place}{' within' if within else ''}{' repeats' if repeats else ''}",
        target=target,
        kernel=f"{_thresholds.__name__}:{kernel.__name__}",
        signature=signature,
        constexprs=constexprs,
        # Rows of two: the second one starts anywhere.
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(kernel.arg_names)
            if name in ("p_scores", "p_gains", "p_target")
        },
    )


def list_builds(target: str) -> Iterator[Build]:
    """The shipped configurations for one target: every tiling, and every branch of the kernel."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dim in (32, 64, 128, 256):
        yield make_build(target, dim, bf16)
        yield make_build(target, dim, fp32)
    yield make_build(target, 128, bf16, bias=True)
    yield make_build(target, 128, bf16, cached=True, ragged=False)
    yield make_build(target, 128, bf16, block_k=128, cached=True, bias=True)
    yield make_build(target, 80, torch.float16)
    yield make_build(target, 128, bf16, block_q=8)
    for kernel in (_sampled.row_sums_kernel, _sampled.sampled_mass_kernel):
        for dim in (32, 64, 128, 256):
            yield make_sample_build(target, kernel, dim, bf16)
            yield make_sample_build(target, kernel, dim, fp32)
            yield make_sample_build(target, kernel, dim, bf16, bias=True)
        yield make_sample_build(target, kernel, 128, bf16, block_k=128, bias=True)
        yield make_sample_build(target, kernel, 128, bf16, ragged=False)
        yield make_sample_build(target, kernel, 128, bf16, ragged=False, bias=True)
        yield make_sample_build(target, kernel, 80, torch.float16)
    yield make_average_build(target, 1)
    yield make_average_build(target, 2)
    yield make_list_build(target, packed=True)
    yield make_list_build(target, packed=False)
    for place, within in (("first", False), ("middle", True), ("last", True)):
        yield make_threshold_build(target, place, within, repeats=within)


def _type_of(argument: str, name: str, constexprs: dict[str, object]) -> str:
    if argument in constexprs:
        return "constexpr"
    if argument in ("p_q", "p_k"):
        return f"*{name}"
    if argument in ("p_rows", "p_orders"):
        return "*i64"
    if argument.startswith("p_"):
        return "*fp32"
    return "fp32" if argument == "scale_log2" else "i32"
