"""The specification against the modules of the models that it stands for."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.normalization import RMSNorm

from dit_opt.kernels.norm_rope import norm_rope

from .scenes import Scene, make_inputs

BATCH, TOKENS, TEXT, HEADS, DIM = 2, 23, 6, 3, 24


def make_x():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(BATCH, TOKENS, HEADS * DIM, generator=generator)


def make_norm(cls, size, eps=1e-5):
    norm = cls(size, eps=eps)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=generator)
    return norm.requires_grad_(False)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cls", [torch.nn.RMSNorm, RMSNorm])
def test_the_norm_of_a_head(cls):
    norm, x = make_norm(cls, DIM), make_x().unflatten(-1, (HEADS, DIM))
    assert_equal(norm_rope(x, norm.weight, norm.eps), norm(x).transpose(1, 2))
    with pytest.raises(AssertionError):
        assert_equal(norm_rope(x, norm.weight, 1e-2), norm(x).transpose(1, 2))


@pytest.mark.parametrize("cls", [torch.nn.RMSNorm, RMSNorm])
def test_the_norm_across_heads(cls):
    norm, x = make_norm(cls, HEADS * DIM), make_x()
    found = norm_rope(x.unflatten(-1, (HEADS, DIM)), norm.weight, norm.eps, across_heads=True)
    assert_equal(found, norm(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2))


def test_a_norm_without_weights():
    x = make_x().unflatten(-1, (HEADS, DIM))
    norm = torch.nn.RMSNorm(DIM, eps=1e-6, elementwise_affine=False)
    assert_equal(norm_rope(x, None, 1e-6), norm(x).transpose(1, 2))


@pytest.mark.parametrize("halves", [False, True])
def test_the_rotation_of_diffusers(halves):
    x = make_x().unflatten(-1, (HEADS, DIM))
    tables = get_1d_rotary_pos_embed(DIM, TOKENS, use_real=True, repeat_interleave_real=not halves)
    unbind_dim = -2 if halves else -1
    expected = apply_rotary_emb(x.transpose(1, 2), tables, use_real_unbind_dim=unbind_dim)
    assert_equal(norm_rope(x, cos=tables[0], sin=tables[1], halves=halves), expected)
    with pytest.raises(AssertionError):
        assert_equal(norm_rope(x, cos=tables[0], sin=tables[1], halves=not halves), expected)


@pytest.mark.parametrize("start", [0, TEXT])
def test_text_is_not_rotated(start):
    # Flux has its text in front, HunyuanVideo behind
    norm, x = make_norm(torch.nn.RMSNorm, DIM), make_x().unflatten(-1, (HEADS, DIM))
    tables = get_1d_rotary_pos_embed(DIM, TOKENS - TEXT, use_real=True)
    stop = start + TOKENS - TEXT
    y = norm(x)
    video = apply_rotary_emb(y[:, start:stop], tables, sequence_dim=1)
    expected = torch.cat([y[:, :start], video, y[:, stop:]], 1).transpose(1, 2)
    assert_equal(norm_rope(x, norm.weight, norm.eps, False, *tables, False, start), expected)
    with pytest.raises(AssertionError):
        wrong = norm_rope(x, norm.weight, norm.eps, False, *tables, False, abs(start - 1))
        assert_equal(wrong, expected)


def rotate_as_wan(x, freqs_cos, freqs_sin):
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1).flatten(-2)


def test_the_prologue_of_wan():
    norm, x = make_norm(torch.nn.RMSNorm, HEADS * DIM), make_x()
    cos, sin = (
        table[None, :, None] for table in get_1d_rotary_pos_embed(DIM, TOKENS, use_real=True)
    )
    expected = rotate_as_wan(norm(x).unflatten(-1, (HEADS, DIM)), cos, sin).transpose(1, 2)
    arguments = (x.unflatten(-1, (HEADS, DIM)), norm.weight, norm.eps, True)
    found = norm_rope(*arguments, cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
    assert_equal(found, expected)
    with pytest.raises(AssertionError):
        assert_equal(norm_rope(*arguments, cos[0, :, 0, 1::2], -sin[0, :, 0, 1::2]), expected)


def test_each_head_has_an_order_of_its_own():
    x, *others, rows = make_inputs(Scene(start=9, rotated=50, rows="per head"))
    plain = norm_rope(x, *others)
    found = norm_rope(x, *others, rows)
    for b in range(x.shape[0]):
        for h in range(x.shape[2]):
            assert torch.equal(found[b, h], plain[b, h, rows[b, h]])
    # the other way round is another order
    assert not torch.equal(found, norm_rope(x, *others, rows.argsort(-1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_rounding_at_the_end(dtype):
    x, *others = make_inputs(Scene(norm="across", table="pair"), dtype)
    assert torch.equal(norm_rope(x, *others), norm_rope(x.float(), *others).to(dtype))


def test_tables_of_lower_precision_are_widened():
    x, weight, eps, across, cos, sin, *others = make_inputs(Scene())
    cos, sin = cos.half(), sin.half()
    expected = norm_rope(x, weight, eps, across, cos.float(), sin.float(), *others)
    assert torch.equal(norm_rope(x, weight, eps, across, cos, sin, *others), expected)
