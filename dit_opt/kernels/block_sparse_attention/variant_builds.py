"""The variants of the attention kernel, ready for compilation ahead of time.

Mirrors what their launchers would compile on first use. Only Hopper has variants.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from dit_opt.kernels.aot import Build
from dit_opt.kernels.block_sparse_attention import gluon as _gluon
from dit_opt.kernels.block_sparse_attention import triton_int8 as _int8
from dit_opt.kernels.block_sparse_attention import triton_int8_tiles as _int8_tiles
from dit_opt.kernels.block_sparse_attention import triton_specialised as _specialised
from dit_opt.kernels.block_sparse_attention.candidates import list_variants
from dit_opt.kernels.block_sparse_attention.tilings import Tiling
from dit_opt.kernels.block_sparse_attention.variants import BLOCK_Q, BLOCKS_K, DIMS

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_ALIGNED = [["tt.divisibility", 16]]


def make_build(
    dim: int, dtype: torch.dtype, block_k: int, tiling: Tiling, *, ragged: bool = True
) -> Build:
    """One configuration of the variant that a tiling names."""
    return _MAKERS[tiling.variant](dim, dtype, block_k, tiling, ragged)


def list_builds(target: str) -> Iterator[Build]:
    """Every variant that there is, and none for other targets than sm_90."""
    if target != "sm_90":
        return
    for dim, block_k in itertools.product(DIMS, BLOCKS_K):
        # each type with a half of them
        dtype = torch.bfloat16 if dim == 128 else torch.float16
        for tiling in list_variants(target, dim, 2, BLOCK_Q, block_k):
            yield make_build(dim, dtype, block_k, tiling)
        yield make_int8_build(dim, dtype, block_k)
    yield make_build(128, torch.bfloat16, 64, Tiling(BLOCK_Q, 64, 4, 3, "gluon"), ragged=False)
    yield make_quantize_build(128, torch.bfloat16, BLOCK_Q, queries=True)
    yield make_quantize_build(128, torch.bfloat16, 64, queries=False)


def make_int8_build(dim: int, dtype: torch.dtype, block_k: int, *, ragged: bool = True) -> Build:
    """The kernel of 8-bit scores."""
    name = _NAMES[dtype]
    constexprs = {
        "DIM": dim,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_K": block_k,
        "TILE_K": _int8.TILE_K,
        "RAGGED_KEYS": ragged,
    }
    types = {
        "p_q": f"tensordesc<i8[1, 1, {BLOCK_Q}, {dim}]>",
        "p_k": f"tensordesc<i8[1, 1, {_int8.TILE_K}, {dim}]>",
        "p_v": f"tensordesc<{name}[1, 1, {_int8.TILE_K}, {dim}]>",
        "p_out": f"*{name}",
    }
    build = _make(
        _int8.block_sparse_attention_int8_kernel,
        _int8.__name__,
        f"int8 D={dim} {name} block {BLOCK_Q}x{block_k} tile {_int8.TILE_K}"
        + (" ragged" if ragged else ""),
        constexprs,
        types | dict.fromkeys(("p_q_scales", "p_k_scales", "p_shifts"), "*fp32"),
        {"num_warps": _int8.WARPS, "num_stages": _int8.STAGES},
    )
    return dataclasses.replace(build, expects_wgmma=True, expects_roles=False)


def make_quantize_build(dim: int, dtype: torch.dtype, block: int, *, queries: bool) -> Build:
    """The kernel that makes 8-bit queries or keys."""
    types = {"p_x": f"*{_NAMES[dtype]}", "p_values": "*i8"}
    build = _make(
        _int8_tiles.quantize_kernel,
        _int8_tiles.__name__,
        f"quantize {'queries' if queries else 'keys'} D={dim} {_NAMES[dtype]} block {block}",
        {"DIM": dim, "BLOCK": block, "IS_QUERY": queries},
        types | dict.fromkeys(("p_mean", "p_scales", "p_shifts"), "*fp32"),
        {"num_warps": _int8.QUANTIZE_WARPS},
    )
    return dataclasses.replace(build, expects_wgmma=False, expects_roles=False)


def _make_gluon(dim: int, dtype: torch.dtype, block_k: int, tiling: Tiling, ragged: bool) -> Build:
    kernel = _gluon.block_sparse_attention_gluon_kernel
    name = _NAMES[dtype]
    constexprs = {
        "DIM": dim,
        "BLOCK_K": block_k,
        "STAGES": tiling.num_stages,
        "ROWS": _gluon.ROWS,
        "RAGGED_KEYS": ragged,
        "COPY_REGISTERS": _gluon.COPY_REGISTERS,
        "ATTEND_REGISTERS": _gluon.ATTEND_REGISTERS,
    }
    descriptors = {
        argument: f"tensordesc<{name}[1, 1, {rows}, {dim}],{_gluon.TILE_LAYOUT!r}>"
        for argument, rows in (("p_q", _gluon.ROWS), ("p_k", block_k), ("p_v", block_k))
    }
    return _make(
        kernel,
        _gluon.__name__,
        f"gluon D={dim} {name} block {BLOCK_Q}x{block_k} stages {tiling.num_stages}"
        + (" ragged" if ragged else ""),
        constexprs,
        descriptors | {"p_out": f"*{name}"},
        {"num_warps": 4},
    )


def _make_specialised(
    dim: int, dtype: torch.dtype, block_k: int, tiling: Tiling, ragged: bool
) -> Build:
    name = _NAMES[dtype]
    constexprs = {
        "DIM": dim,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_K": block_k,
        "TILE_K": tiling.tile_k,
        "RAGGED_KEYS": ragged,
    }
    tile = f"tensordesc<{name}[1, 1, {tiling.tile_k}, {dim}]>"
    return _make(
        _specialised.block_sparse_attention_specialised_kernel,
        _specialised.__name__,
        f"specialised D={dim} {name} block {BLOCK_Q}x{block_k} tile {tiling.tile_k} "
        f"stages {tiling.num_stages}" + (" ragged" if ragged else ""),
        constexprs,
        {"p_q": f"*{name}", "p_k": tile, "p_v": tile, "p_out": f"*{name}"},
        {"num_warps": 4, "num_stages": tiling.num_stages},
    )


def _make(
    kernel: object,
    module: str,
    config: str,
    constexprs: dict[str, object],
    types: dict[str, str],
    options: dict[str, int],
) -> Build:
    """A build for Hopper whose pointers and strides are aligned, and whose warps have roles."""
    fixed = {"p_lse": "*fp32", "scale_log2": "fp32"}
    known = fixed | types | dict.fromkeys(constexprs, "constexpr")
    names = kernel.arg_names
    signature = {n: known.get(n, "*i32" if n.startswith("p_") else "i32") for n in names}
    return Build(
        config=config,
        target="sm_90",
        kernel=f"{module}:{kernel.__name__}",
        signature=signature,
        constexprs=constexprs,
        attrs={
            (position,): _ALIGNED
            for position, name in enumerate(names)
            if signature[name].startswith("*") or name.startswith("stride_")
        },
        options=options,
        expects_wgmma=True,
        expects_roles=True,
    )


_MAKERS = {"gluon": _make_gluon, "specialised": _make_specialised}
