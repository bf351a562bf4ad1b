"""The variants of the attention kernel, ready for compilation ahead of time.

Mirrors what their launchers would compile on first use. Only Hopper has variants.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from dit_opt.kernels.aot import Build
from dit_opt.kernels.block_sparse_attention import gluon as _gluon
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
    """Every variant that `list_variants` names, and none for other targets than sm_90."""
    for dim, block_k in itertools.product(DIMS, BLOCKS_K):
        for tiling in list_variants(target, dim, 2, BLOCK_Q, block_k):
            # a half of them each, so that both types and both branches are seen in time
            dtype = torch.bfloat16 if dim == 128 else torch.float16
            yield make_build(dim, dtype, block_k, tiling)


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
