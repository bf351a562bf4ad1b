"""Cases for the Triton kernel that moves tokens; `test_triton.py` runs them in a process of
their own, where TRITON_INTERPRET is set before the kernel is defined."""

from __future__ import annotations

import os

import pytest
import torch

from dit_opt.kernels import token_order
from dit_opt.kernels.token_order.impl.triton import gather

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def make(layout, dtype, batch=2, heads=6, key_heads=2, tokens=150, dim=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, key_heads, tokens, dim, generator=generator).to(dtype)
    if layout == "bnhd":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded":
        x = x[:1].expand(batch, -1, -1, -1)
    rows = torch.rand(batch, heads, tokens, generator=generator).argsort(-1)
    return x.to(DEVICE), rows.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided", "expanded"])
@pytest.mark.parametrize("key_heads", [6, 2, 1])
def test_gathers_as_pytorch_does(layout, dtype, key_heads):
    x, rows = make(layout, dtype, key_heads=key_heads)
    found = gather.gather_tokens(x, rows)
    assert torch.equal(found, token_order.gather_tokens(x, rows)) and found.is_contiguous()


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
def test_scatters_as_pytorch_does(layout):
    x, rows = make(layout, torch.float16, key_heads=6)
    found = gather.scatter_tokens(x, rows.argsort(-1))
    expected = token_order.scatter_tokens(x, rows.argsort(-1))
    assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_fewer_rows_than_tokens_and_rows_that_are_not_contiguous():
    x, rows = make("bhnd", torch.float32)
    for part in (rows[..., :70], rows[..., :70].transpose(0, 1).contiguous().transpose(0, 1)):
        found = gather.gather_tokens(x, part)
        assert torch.equal(found, token_order.gather_tokens(x, part))


def test_nothing_to_move():
    x, rows = make("bhnd", torch.float32)
    assert gather.gather_tokens(x, rows[..., :0]).shape == (2, 6, 0, 40)


def test_the_operators_move_tokens_of_the_device():
    x, rows = make("bnhd", torch.float16, key_heads=6)
    moved = torch.ops.ditopt.gather_tokens_v1(x, rows)
    assert torch.equal(torch.ops.ditopt.scatter_tokens_v1(moved, rows.argsort(-1)), x)
