"""Packed plans are the lists that went in, for any length, and small."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.cpp.build import load_library
from dit_opt.kernels.plan import packing
from dit_opt.kernels.plan.packing import pack_plan, unpack_plan
from dit_opt.kernels.plan.plan import list_kept


@pytest.fixture(autouse=True, params=["cpp", "torch"])
def path(request, monkeypatch):
    """The C++ kernel, where there is a compiler, and torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(packing, "pack_lists", lambda counts, lists, blocks: None)
        monkeypatch.setattr(packing, "unpack_lists", lambda words, blocks: None)
    elif load_library() is None:
        pytest.skip("there is no C++ compiler")


def make_lists(blocks, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list_kept(torch.rand(2, 3, 5, blocks, generator=generator) < density)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("blocks", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("missing", [0, 3])
def test_lists_come_out_as_they_went_in(blocks, density, missing):
    counts, indices = make_lists(blocks, density)
    tokens = 16 * blocks - missing
    words = pack_plan(counts, indices, tokens, 16)
    assert words.dtype == torch.int32 and words.shape == (2, 3, 5, -(-blocks // 32))
    for found, expected in zip(unpack_plan(words, tokens, 16), (counts, indices), strict=True):
        assert found.dtype == torch.int32 and torch.equal(found, expected)


def test_lists_that_end_early_lose_nothing():
    counts, indices = make_lists(50, 0.1)
    short = indices[..., : int(counts.max())]
    found = unpack_plan(pack_plan(counts, short, 800, 16), 800, 16)
    assert torch.equal(found[0], counts) and torch.equal(found[1], indices)


def test_bit_and_word_are_where_the_docstring_says():
    counts, indices = list_kept(torch.arange(70).eq(37)[None] | torch.arange(70).eq(31)[None])
    assert pack_plan(counts, indices, 70, 1).tolist() == [[-(2**31), 2**5, 0]]


def test_schemas_and_fakes_agree():
    counts, indices = make_lists(40, 0.4)
    pack, unpack = torch.ops.ditopt.pack_plan_v1, torch.ops.ditopt.unpack_plan_v1
    torch.library.opcheck(pack.default, (counts, indices, 640, 16))
    torch.library.opcheck(unpack.default, (pack_plan(counts, indices, 640, 16), 640, 16))
