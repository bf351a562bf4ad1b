"""Cases for the Triton kernels of packed plans; `test_lists_triton.py` runs them in a process of
their own, where TRITON_INTERPRET is set before the kernels are defined."""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.impl.triton.tail import pack_lists
from dit_opt.kernels.plan import packing
from dit_opt.kernels.plan.impl.triton import lists as triton_lists
from dit_opt.kernels.plan.plan import list_kept

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("blocks", [1, 31, 32, 100, 256, 700])
def test_lists_come_out_as_they_went_in(blocks, density, monkeypatch):
    generator = torch.Generator().manual_seed(blocks)
    kept = torch.rand(2, 3, 5, blocks, generator=generator) < density
    counts, indices = (x.to(DEVICE) for x in list_kept(kept))
    words = packing.pack_plan(counts, indices, blocks, 1)
    assert torch.equal(pack_lists(counts, indices, blocks), words)
    new_empty = torch.Tensor.new_empty
    # whatever is not written shows
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(-7))
    found = triton_lists.unpack_plan(words, blocks, 1)
    assert torch.equal(found[0], counts) and torch.equal(found[1], indices)


@pytest.mark.parametrize("blocks", [1, 300])
def test_masks_give_their_lists(blocks, monkeypatch):
    kept = torch.rand(2, 3, 5, blocks, generator=torch.Generator().manual_seed(0)) < 0.1
    kept[0, 0, 0], kept[0, 0, 1] = True, False
    expected = list_kept(kept)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(77))
    for mask in (kept, kept.transpose(0, 1).contiguous().transpose(0, 1)):
        found = triton_lists.list_kept(mask.to(DEVICE))
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


def test_words_that_are_not_contiguous():
    counts, indices = list_kept(torch.rand(2, 3, 5, 40) < 0.5)
    words = packing.pack_plan(counts, indices, 40, 1).to(DEVICE).transpose(0, 1)
    found = triton_lists.unpack_plan(words, 40, 1)
    assert torch.equal(found[0].cpu(), counts.transpose(0, 1))
    assert torch.equal(found[1].cpu(), indices.transpose(0, 1))


def test_no_row_at_all():
    counts, indices = triton_lists.unpack_plan(torch.empty(0, 2, 3, 1, dtype=torch.int32), 20, 1)
    assert counts.shape == (0, 2, 3) and indices.shape == (0, 2, 3, 20)
