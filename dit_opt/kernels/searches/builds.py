"""Every configuration of the searches' kernels that ships, ready for compilation ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_opt.kernels.aot import Build, make_build
from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.launch import TYPE_NAMES
from dit_opt.kernels.plan.impl.triton import lists as triton_lists
from dit_opt.kernels.plan.impl.triton import thresholds as triton_thresholds
from dit_opt.kernels.searches.mass.impl.triton import sampled as triton_sampled
from dit_opt.kernels.searches.mass.sampled import RowMeans

# Items, query heads and key heads; sizes that are no multiples of 16 are compiled for any size.
_BATCH, _HEADS, _KEY_HEADS = 2, 6, 2


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def make_share_build(
    target: str,
    dim: int,
    dtype: torch.dtype,
    block_k: int = 64,
    *,
    ragged: bool = True,
    bias: bool = False,
) -> Build:
    """One configuration of the kernel of sampled rows."""
    keys, rows, kinds = 1024 if not ragged else 1001, 75, 3
    q, k = (_empty(_BATCH, n, keys, dim, dtype=dtype) for n in (_HEADS, _KEY_HEADS))
    key_bias = _empty(_BATCH, _HEADS, keys) if bias else None
    tiling = triton_sampled.choose_sample_tiling(
        target, triton_sampled.pad_dim(dim), dtype.itemsize, block_k, bias
    )
    tiles = ceil_div(keys, block_k) * (block_k // tiling.tile_k)
    launch = triton_sampled.launch_shares(
        q,
        k,
        key_bias,
        0.5,
        _empty(kinds, rows, dtype=torch.int64),
        _empty(kinds, keys, dtype=torch.int64),
        block_k,
        0,
        _empty(_HEADS, kinds, tiles, rows),
        _empty(_HEADS, kinds, rows),
        target,
    )
    tile = f"tile {tiling.tile_q}x{tiling.tile_k}"
    config = (
        f"sampled mass D={dim} {TYPE_NAMES[dtype]} block {block_k} {tile} warps {tiling.num_warps} "
        f"stages {tiling.num_stages}" + (" ragged" if ragged else "") + (" bias" if bias else "")
    )
    return make_build(target, launch, config)


def make_mean_build(target: str, tiles: int) -> Build:
    """The kernel of means over sampled rows."""
    kinds, rows, query_blocks, key_blocks = 3, 75, 9, 17
    launch = triton_sampled.launch_means(
        _empty(_HEADS, kinds, key_blocks * tiles, rows),
        _empty(_HEADS, kinds, rows),
        RowMeans(
            _empty(kinds, rows, dtype=torch.int64),
            _empty(kinds, query_blocks, dtype=torch.int32),
            _empty(kinds, query_blocks, dtype=torch.int32),
        ),
        _empty(_HEADS, kinds, query_blocks, key_blocks),
    )
    return make_build(target, launch, f"average rows {tiles} tiles")


def make_list_build(target: str, packed: bool) -> Build:
    """The kernel that makes lists of packed plans, or of block masks."""
    rows, blocks = (_BATCH, _HEADS, 9), 70
    kept = (
        _empty(*rows, ceil_div(blocks, 32), dtype=torch.int32)
        if packed
        else _empty(*rows, blocks, dtype=torch.uint8)
    )
    counts, indices = (_empty(*shape, dtype=torch.int32) for shape in (rows, (*rows, blocks)))
    launch = triton_lists.launch_lists(kept, counts, indices)
    name = f"list {'packed' if packed else 'masked'} blocks chunk {triton_lists.CHUNK}"
    return make_build(target, launch, name)


def make_threshold_build(target: str, place: str, within: bool, repeats: bool) -> Build:
    """One launch of a search for a threshold: the "first", a "middle" or the "last" one."""
    groups, size, parts, steps = 6, 9 * 1001, 9, 29
    gains = _empty(1001) if repeats else _empty(groups, size)
    low, next_low = (_empty(groups, dtype=torch.int32) for _ in range(2))
    sums, next_sums = (_empty(groups, parts) for _ in range(2))
    buffers = (low, next_low, sums, next_sums)
    step = {"first": steps - 1, "middle": 7, "last": -1}[place]
    launch = triton_thresholds.launch_step(
        _empty(groups, size), gains, _empty(groups), *buffers, step, steps, within
    )
    name = f"threshold {place}{' within' if within else ''}{' repeats' if repeats else ''}"
    return make_build(target, launch, name)


def list_builds(target: str) -> Iterator[Build]:
    """The shipped configurations for one target: every tiling, and every branch of the kernels."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dim in (32, 64, 128, 256):
        yield make_share_build(target, dim, bf16)
        yield make_share_build(target, dim, fp32)
        yield make_share_build(target, dim, bf16, bias=True)
    yield make_share_build(target, 128, bf16, block_k=128, bias=True)
    yield make_share_build(target, 128, bf16, ragged=False)
    yield make_share_build(target, 128, bf16, ragged=False, bias=True)
    yield make_share_build(target, 80, torch.float16)
    yield make_mean_build(target, 1)
    yield make_mean_build(target, 2)
    yield make_list_build(target, packed=True)
    yield make_list_build(target, packed=False)
    for place, within in (("first", False), ("middle", True), ("last", True)):
        yield make_threshold_build(target, place, within, repeats=within)
