"""Launches of the variants, for the linter to compile ahead of time. Only Hopper has variants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from dit_opt.kernels.aot import Build, make_build, make_meta
from dit_opt.kernels.block_sparse_attention.contract import ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.experimental import gluon, int8, specialised
from dit_opt.kernels.block_sparse_attention.experimental.variants import BLOCK_Q, BLOCKS_K, DIMS
from dit_opt.kernels.block_sparse_attention.impl.triton.builds import Case, make_call
from dit_opt.kernels.block_sparse_attention.impl.triton.candidates import list_variants
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling
from dit_opt.kernels.launch import TYPE_NAMES

_TARGET = "sm_90"


def build_variant(case: Case, tiling: Tiling) -> Build:
    """The launch of the variant that a tiling names."""
    call = make_call(case)
    tensors = (call, torch.empty_like(call.counts), *new_outputs(call.q))
    if tiling.variant == "gluon":
        launch, tile = gluon.prepare(*tensors, tiling.num_stages), ""
    else:
        launch, tile = specialised.prepare(*tensors, tiling), f"tile {tiling.tile_k} "
    config = f"{tiling.variant} {_describe(case)} {tile}stages {tiling.num_stages}"
    config += " ragged" if case.ragged else ""
    return make_build(_TARGET, launch, config, expects_wgmma=True, expects_roles=True)


def build_int8(case: Case) -> Build:
    """The launch of the kernel of 8-bit scores."""
    call = make_call(case)
    queries, keys = (
        _make_quantized(x, block) for x, block in ((call.q, call.block_q), (call.k, call.block_k))
    )
    shifts = make_meta(*call.q.shape[:3])
    order = torch.empty_like(call.counts)
    launch = int8.prepare(call, queries, shifts, keys, order, *new_outputs(call.q))
    config = f"int8 {_describe(case)} tile {int8.TILE_K}" + (" ragged" if case.ragged else "")
    return make_build(_TARGET, launch, config, expects_wgmma=True)


def build_quantize(dim: int, dtype: torch.dtype, block: int, *, queries: bool) -> Build:
    """The launch of the kernel that makes 8-bit queries or keys."""
    call = make_call(Case(dim, dtype))
    x = call.q if queries else call.k
    mean = make_meta(x.shape[0], call.k.shape[1], dim)
    shifts = make_meta(*x.shape[:3]) if queries else None
    launch = int8.prepare_quantize(x, mean, block, _make_quantized(x, block), shifts)
    kind = "queries" if queries else "keys"
    return make_build(_TARGET, launch, f"quantize {kind} D={dim} {TYPE_NAMES[dtype]} block {block}")


def list_builds(target: str) -> Iterator[Build]:
    """Every variant that there is, and none for other targets than sm_90."""
    if target != _TARGET:
        return
    for dim, block_k in itertools.product(DIMS, BLOCKS_K):
        # each type with a half of them
        dtype = torch.bfloat16 if dim == 128 else torch.float16
        case = Case(dim, dtype, BLOCK_Q, block_k)
        for tiling in list_variants(target, dim, 2, BLOCK_Q, block_k):
            yield build_variant(case, tiling)
        yield build_int8(case)
    yield build_variant(Case(128, ragged=False), Tiling(BLOCK_Q, 64, 4, 3, "gluon"))
    yield build_quantize(128, torch.bfloat16, BLOCK_Q, queries=True)
    yield build_quantize(128, torch.bfloat16, 64, queries=False)


def _make_quantized(x: torch.Tensor, block: int) -> int8.Quantized:
    scales = make_meta(*x.shape[:2], ceil_div(x.shape[2], block))
    return int8.Quantized(make_meta(*x.shape, dtype=torch.int8), scales)


def _describe(case: Case) -> str:
    return f"D={case.dim} {TYPE_NAMES[case.dtype]} block {case.block_q}x{case.block_k}"
