"""The plan keeps every block, whatever the shapes."""

from __future__ import annotations

import pytest
import torch

import dit_opt.kernels.searches  # noqa: F401


@pytest.mark.parametrize("queries, keys", [(64, 64), (65, 31), (1, 129)])
def test_every_key_block_is_listed(queries, keys):
    q = torch.zeros(2, 3, queries, 8)
    counts, indices = torch.ops.ditopt.keep_all_v1(q, keys, 32, 16)
    key_blocks = -(-keys // 16)
    assert counts.shape == (1, 3, -(-queries // 32)) and counts.dtype == torch.int32
    assert (counts == key_blocks).all()
    assert indices.dtype == torch.int32
    assert torch.equal(indices, torch.arange(key_blocks).int().expand(*counts.shape, -1))


def test_schema_and_fake_agree():
    torch.library.opcheck(torch.ops.ditopt.keep_all_v1, (torch.zeros(2, 3, 65, 8), 31, 32, 16))
