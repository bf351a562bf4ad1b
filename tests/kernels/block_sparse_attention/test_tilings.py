"""The table of tilings and the rules that pick from it."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.impl.triton import tilings


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [1, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_tiles_divide_blocks(architecture, itemsize, dim, block):
    padded = tilings.pad_dim(dim)
    tiling = tilings.choose_tiling(architecture, padded, itemsize, block, block)
    assert block % tiling.tile_q == 0 and block % tiling.tile_k == 0
    assert tiling.num_warps >= 1 and padded >= dim


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_the_tail_takes_smaller_tiles_through_pointers_and_for_wide_heads(itemsize, dim):
    tiling = tilings.choose_tiling("sm_90", dim, itemsize, 128, 64)
    assert (tilings.choose_tail_tile(tiling, dim, True) == tiling.tile_k) == (
        dim < 256 or tiling.tile_k == 16
    )
    tile = tilings.choose_tail_tile(tiling, dim, False)
    # tl.dot multiplies no fewer than 16 columns.
    assert 16 <= tile <= max(16, tiling.tile_k // 2)


def test_a_tail_through_pointers_prefetches_less():
    def count_stages(architecture, **kind):
        return tilings.choose_tiling(architecture, 128, 2, 128, 64, **kind).num_stages

    assert count_stages("sm_80") == count_stages("sm_90", tail=True) == 3
    assert count_stages("sm_80", tail=True) == 2
    assert count_stages("sm_90", tail=True, aligned=False) == 2


def test_pad_dim():
    assert [tilings.pad_dim(d) for d in (1, 32, 33, 72, 96, 120, 128, 129, 256)] == [
        32, 32, 64, 128, 128, 128, 128, 256, 256,
    ]  # fmt: skip


def test_alignment_is_read_from_pointer_and_strides():
    x = torch.empty(2, 3, 8, 64, dtype=torch.float16)
    assert tilings.is_aligned(x) and tilings.is_aligned(x.transpose(1, 2))
    assert not tilings.is_aligned(x[..., 1:])
    assert not tilings.is_aligned(x.mT)
    assert not tilings.is_aligned(x[..., :9].contiguous())
    assert not tilings.is_aligned(x[:1].expand(2, -1, -1, -1))


def test_only_16_bit_tensors_on_hopper_and_later_use_descriptors():
    assert tilings.takes_descriptors("sm_90", 2) and tilings.takes_descriptors("sm_120", 2)
    assert not tilings.takes_descriptors("sm_89", 2)
    assert not tilings.takes_descriptors("sm_90", 4)
    assert not tilings.takes_descriptors("gfx942", 2)
