"""Every configuration of the Triton kernel that ships, ready for compilation ahead of time.

Mirrors what `triton.launch` would compile on first use, so that the linter sees the same code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from dit_opt.kernels.aot import Build
from dit_opt.kernels.block_sparse_attention import row_order_triton as _order
from dit_opt.kernels.block_sparse_attention import triton as _launcher
from dit_opt.kernels.block_sparse_attention import triton_tail as _tail
from dit_opt.kernels.block_sparse_attention.candidates import list_candidates
from dit_opt.kernels.block_sparse_attention.tilings import (
    Tiling,
    choose_precision,
    choose_tail_tile,
    choose_tiling,
    pad_dim,
    takes_descriptors,
)

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ALIGNED = [["tt.divisibility", 16]]
# Pointers to what the launcher allocates or makes contiguous.
_ALWAYS_ALIGNED = (
    "p_counts",
    "p_indices",
    "p_order",
    "p_out",
    "p_lse",
    "p_bias",
    "p_log_lengths",
    "p_words",
)
_TAIL_ARGUMENTS = (
    "p_centroids",
    "p_values",
    "p_log_lengths",
    "p_words",
    "tail_group",
    "stride_len_b",
    "stride_len_h",
)


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
    tail: bool = False,
    tiling: Tiling | None = None,
) -> Build:
    """One configuration; `aligned` false is what tensors that fit no descriptor get.

    The tiling is that of the table, unless another one is given.
    """
    kernel = _launcher.block_sparse_attention_fwd_kernel
    padded_dim = pad_dim(dim)
    if tiling is None:
        tiling = choose_tiling(target, padded_dim, dtype.itemsize, block_q, block_k, aligned, tail)
    use_descriptors = aligned and takes_descriptors(target, dtype.itemsize)
    tile_tail = choose_tail_tile(tiling, padded_dim, use_descriptors)
    constexprs = {
        "DIM": dim,
        "PADDED_DIM": padded_dim,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": tiling.tile_q,
        "TILE_K": tiling.tile_k,
        "TILE_TAIL": tile_tail,
        "HAS_BIAS": bias,
        "RAGGED_KEYS": ragged,
        "HAS_TAIL": tail,
        "USE_DESCRIPTORS": use_descriptors,
        "PRECISION": choose_precision(target, padded_dim, dtype.itemsize),
    }
    if not tail:
        constexprs |= dict.fromkeys(_TAIL_ARGUMENTS)
    name = _NAMES[dtype]
    signature = {}
    for argument in kernel.arg_names:
        signature[argument] = _type_of(argument, name, constexprs)
    for argument in ("stride_qd", "stride_kd", "stride_vd"):
        # The launcher turns an integer argument of 1 into a constant.
        signature[argument] = "constexpr"
        constexprs[argument] = 1
    if use_descriptors:
        tiles = dict.fromkeys(("p_k", "p_v"), tiling.tile_k) | {"p_q": tiling.tile_q}
        if tail:
            tiles |= dict.fromkeys(("p_centroids", "p_values"), tile_tail)
        for argument, tile in tiles.items():
            signature[argument] = f"tensordesc<{name}[1, 1, {tile}, {padded_dim}]>"
    attrs = {
        (position,): _ALIGNED
        for position, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument.startswith("stride_")
        if signature[argument] != "constexpr"
        # The number of blocks, a stride of the lengths, is of any size.
        if argument in _ALWAYS_ALIGNED or (aligned and not argument.startswith("stride_len"))
    }
    return Build(
        config=(
            f"D={dim} {name} block {block_q}x{block_k} tile {tiling.tile_q}x{tiling.tile_k} "
            f"warps {tiling.num_warps} stages {tiling.num_stages}"
            + (" ragged" if ragged else "")
            + (" bias" if bias else "")
            + ("" if aligned else " unaligned")
            + (" tail" if tail else "")
        ),
        target=target,
        kernel=f"{_launcher.__name__}:{kernel.__name__}",
        signature=signature,
        constexprs=constexprs,
        attrs=attrs,
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        expects_wgmma=target == "sm_90" and use_descriptors,
    )


def make_pack_build(target: str) -> Build:
    """The kernel that packs lists into bits for the tail."""
    kernel = _tail.pack_lists_kernel
    pointers = ("p_counts", "p_indices", "p_words")
    constexprs = {"WORDS": _tail.WORDS, "CHUNK": _tail.CHUNK}
    return Build(
        config=f"pack lists words {_tail.WORDS} chunk {_tail.CHUNK}",
        target=target,
        kernel=f"{_tail.__name__}:{kernel.__name__}",
        signature=dict.fromkeys(pointers, "*i32")
        | {"capacity": "i32", "words": "i32"}
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        attrs={(position,): _ALIGNED for position in range(len(pointers))},
    )


def make_order_build(target: str) -> Build:
    """The kernel that finds the order of rows."""
    kernel = _order.order_rows_kernel
    constexprs = {"TILE": _order.TILE, "CHUNK": _order.CHUNK}
    return Build(
        config=f"order rows tile {_order.TILE} chunk {_order.CHUNK}",
        target=target,
        kernel=f"{_order.__name__}:{kernel.__name__}",
        signature={"p_counts": "*i32", "p_order": "*i32", "rows": "i32"}
        | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        attrs={(0,): _ALIGNED, (1,): _ALIGNED},
    )


def list_builds(target: str) -> Iterator[Build]:
    """The shipped configurations for one target: every tiling, and every branch of the kernel."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dim in (32, 64, 128, 256):
        yield make_build(target, dim, bf16)
        yield make_build(target, dim, fp32)
        yield make_build(target, dim, fp32, tail=True)
        if dim > 32:
            # of 32 channels the tiling is that of 64
            yield make_build(target, dim, bf16, bias=True)
        if dim in (64, 128):
            yield make_build(target, dim, bf16, tail=True)
    yield make_order_build(target)
    yield make_build(target, 128, bf16, block_k=128, ragged=False)
    yield make_build(target, 128, bf16, block_q=64)
    yield make_build(target, 128, bf16, aligned=False)
    yield make_build(target, 80, fp16)
    yield make_build(target, 128, bf16, bias=True, tail=True)
    yield make_build(target, 256, bf16, bias=True, tail=True)
    yield make_build(target, 128, bf16, block_k=128, tail=True)
    yield make_build(target, 128, bf16, aligned=False, tail=True)
    for dim, block_k in itertools.product((64, 128), (64, 128)):
        usual = choose_tiling(target, dim, 2, 128, block_k)
        for tiling in list_candidates(target, dim, 2, 128, block_k):
            if tiling != usual:
                yield make_build(target, dim, bf16, block_k=block_k, tiling=tiling)
    yield make_pack_build(target)


def _type_of(argument: str, name: str, constexprs: dict[str, object]) -> str:
    if argument in constexprs:
        return "constexpr"
    if argument in ("p_bias", "p_lse", "p_log_lengths"):
        return "*fp32"
    if argument in ("p_counts", "p_indices", "p_order", "p_words"):
        return "*i32"
    if argument.startswith("p_"):
        return f"*{name}"
    return "fp32" if argument == "scale_log2" else "i32"
