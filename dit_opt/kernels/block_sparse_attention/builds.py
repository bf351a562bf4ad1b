"""Every configuration of the Triton kernel that ships, ready for compilation ahead of time.

Mirrors what `triton.launch` would compile on first use, so that the linter sees the same code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dit_opt.kernels.aot import Build
from dit_opt.kernels.block_sparse_attention import triton as _launcher
from dit_opt.kernels.block_sparse_attention.tilings import (
    choose_precision,
    choose_tiling,
    pad_dim,
    takes_descriptors,
)

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ALIGNED = [["tt.divisibility", 16]]


def make_build(
    target: str,
    dim: int,
    dtype: torch.dtype,
    block_q: int = 128,
    block_k: int = 64,
    *,
    ragged: bool = True,
    bias: bool = False,
    aligned: bool = True,
) -> Build:
    """One configuration; `aligned` false is what tensors that fit no descriptor get."""
    kernel = _launcher.block_sparse_attention_fwd_kernel
    padded_dim = pad_dim(dim)
    tiling = choose_tiling(target, padded_dim, dtype.itemsize, block_q, block_k, aligned)
    use_descriptors = aligned and takes_descriptors(target, dtype.itemsize)
    constexprs = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": tiling.tile_q,
        "TILE_K": tiling.tile_k,
        "HAS_BIAS": bias,
        "RAGGED_KEYS": ragged,
        "USE_DESCRIPTORS": use_descriptors,
        "PRECISION": choose_precision(target, padded_dim, dtype.itemsize),
    }
    name = _NAMES[dtype]
    signature = {}
    for argument in kernel.arg_names:
        signature[argument] = _type_of(argument, name, constexprs)
    for argument in ("stride_qd", "stride_kd", "stride_vd"):
        # The launcher turns an integer argument of 1 into a constant.
        signature[argument] = "constexpr"
        constexprs[argument] = 1
    if use_descriptors:
        for argument, tile in (
            ("p_q", tiling.tile_q),
            ("p_k", tiling.tile_k),
            ("p_v", tiling.tile_k),
        ):
            signature[argument] = f"tensordesc<{name}[1, 1, {tile}, {padded_dim}]>"
    attrs = {
        (position,): _ALIGNED
        for position, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument.startswith("stride_")
        if signature[argument] != "constexpr"
        if aligned or argument in ("p_counts", "p_indices", "p_out", "p_lse", "p_bias")
    }
    return Build(
        config=(
            f"D={dim} {name} block {block_q}x{block_k} tile {tiling.tile_q}x{tiling.tile_k} "
            f"warps {tiling.num_warps} stages {tiling.num_stages}"
            + (" ragged" if ragged else "")
            + (" bias" if bias else "")
            + ("" if aligned else " unaligned")
        ),
        target=target,
        kernel=f"{_launcher.__name__}:{kernel.__name__}",
        signature=signature,
        constexprs=constexprs,
        attrs=attrs,
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        expects_wgmma=target == "sm_90" and use_descriptors,
    )


def list_builds(target: str) -> Iterator[Build]:
    """The shipped configurations for one target: every tiling, and every branch of the kernel."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dim in (32, 64, 128, 256):
        yield make_build(target, dim, bf16)
        yield make_build(target, dim, fp32)
        yield make_build(target, dim, bf16, bias=True)
    yield make_build(target, 128, bf16, block_k=128)
    yield make_build(target, 128, bf16, block_k=128, ragged=False)
    yield make_build(target, 128, bf16, block_q=64)
    yield make_build(target, 128, bf16, aligned=False)
    yield make_build(target, 128, fp16)
    yield make_build(target, 80, bf16)


def _type_of(argument: str, name: str, constexprs: dict[str, object]) -> str:
    if argument in constexprs:
        return "constexpr"
    if argument in ("p_bias", "p_lse"):
        return "*fp32"
    if argument in ("p_counts", "p_indices"):
        return "*i32"
    if argument.startswith("p_"):
        return f"*{name}"
    return "fp32" if argument == "scale_log2" else "i32"
