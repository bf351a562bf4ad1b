"""Every configuration of the searches' kernels that ships, ready for compilation ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dit_opt.kernels.aot import Build, make_build, make_meta
from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.launch import TYPE_NAMES
from dit_opt.kernels.plan.impl.triton import lists as triton_lists
from dit_opt.kernels.plan.impl.triton import thresholds as triton_thresholds
from dit_opt.kernels.searches.mass.impl.triton import sampled as triton_sampled
from dit_opt.kernels.searches.mass.sampled import RowMeans

# Items, query heads and key heads; sizes that are no multiples of 16 are compiled for any size.
_BATCH, _HEADS, _KEY_HEADS = 2, 6, 2


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
    q, k = (make_meta(_BATCH, n, keys, dim, dtype=dtype) for n in (_HEADS, _KEY_HEADS))
    key_bias = make_meta(_BATCH, _HEADS, keys) if bias else None
    tiling = triton_sampled.choose_sample_tiling(
        target, triton_sampled.pad_dim(dim), dtype.itemsize, block_k, bias
    )
    tiles = ceil_div(keys, block_k) * (block_k // tiling.tile_k)
    launch = triton_sampled.launch_shares(
        q,
        k,
        key_bias,
        0.5,
        make_meta(kinds, rows, dtype=torch.int64),
        make_meta(kinds, keys, dtype=torch.int64),
        block_k,
        0,
        make_meta(_HEADS, kinds, tiles, rows),
        make_meta(_HEADS, kinds, rows),
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
        make_meta(_HEADS, kinds, key_blocks * tiles, rows),
        make_meta(_HEADS, kinds, rows),
        RowMeans(
            make_meta(kinds, rows, dtype=torch.int64),
            make_meta(kinds, query_blocks, dtype=torch.int32),
            make_meta(kinds, query_blocks, dtype=torch.int32),
        ),
        make_meta(_HEADS, kinds, query_blocks, key_blocks),
    )
    return make_build(target, launch, f"average rows {tiles} tiles")


def make_list_build(target: str, packed: bool) -> Build:
    """The kernel that makes lists of packed plans, or of block masks."""
    rows, blocks = (_BATCH, _HEADS, 9), 70
    kept = (
        make_meta(*rows, ceil_div(blocks, 32), dtype=torch.int32)
        if packed
        else make_meta(*rows, blocks, dtype=torch.uint8)
    )
    counts, indices = (make_meta(*shape, dtype=torch.int32) for shape in (rows, (*rows, blocks)))
    launch = triton_lists.launch_lists(kept, counts, indices)
    name = f"list {'packed' if packed else 'masked'} blocks chunk {triton_lists.CHUNK}"
    return make_build(target, launch, name)


def make_threshold_build(target: str, place: str, within: bool, repeats: bool) -> Build:
    """One launch of a search for a threshold: the "first", a "middle" or the "last" one."""
    groups, size, parts, steps = 6, 9 * 1001, 9, 29
    gains = make_meta(1001) if repeats else make_meta(groups, size)
    low, next_low = (make_meta(groups, dtype=torch.int32) for _ in range(2))
    sums, next_sums = (make_meta(groups, parts) for _ in range(2))
    buffers = (low, next_low, sums, next_sums)
    step = {"first": steps - 1, "middle": 7, "last": -1}[place]
    launch = triton_thresholds.launch_step(
        make_meta(groups, size), gains, make_meta(groups), *buffers, step, steps, within
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
