"""What is read of the queries and keys of real models, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

from dit_opt.facts.prologue import Prologue, find_prologue
from dit_opt.facts.sites import find_sites
from tests.graphs import capture_one, capture_tiny
from zoo import small


@functools.cache
def prologues(name):
    _, gm = capture_tiny(getattr(small, name))
    return [[find_prologue(n) for n in (s.query, s.key)] for s in find_sites(gm.graph)]


def describe(part):
    norm, rotation = part.norm, part.rotation
    return (
        None if norm is None else ("all heads" if norm.across_heads else "head"),
        None if rotation is None else ("halves" if rotation.halves else "pairs"),
    )


@pytest.mark.parametrize(
    ("name", "site", "parts"),
    [
        ("wan", 0, [("all heads", "pairs")]),
        ("wan", 1, [("all heads", None)]),
        ("hunyuan_video", 1, [("head", "pairs"), ("head", None)]),
        ("hunyuan_video", 2, [("head", "pairs")]),
        ("flux", 1, [("head", "pairs")]),
        ("sd3", 0, [("head", None), ("head", None)]),
    ],
)
def test_models(name, site, parts):
    for found in prologues(name)[site]:
        assert isinstance(found, Prologue), found
        assert [describe(part) for part in found.parts] == parts
        assert all(part.norm.eps == 1e-6 and part.norm.weight is not None for part in found.parts)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("hunyuan_video", 0, "neither normalised"),
        ("flux", 0, "after its parts were put together"),
        ("cogvideox", 0, "neither normalised"),
        ("ltx_video", 0, "neither normalised"),
        ("dit", 0, "neither normalised"),
    ],
)
def test_models_that_are_refused(name, site, reason):
    for found in prologues(name)[site]:
        assert isinstance(found, str) and reason in found


class Attention(torch.nn.Module):
    """Sites whose queries are made by `changes`; everything else is plain."""

    def __init__(self, *changes, weight=True):
        super().__init__()
        self.norm = RMSNorm(16, 1e-5, elementwise_affine=weight).requires_grad_(False)
        self.changes = changes

    def forward(self, x, cos, sin):
        x = x.unflatten(2, (2, 16))
        queries = [change(self.norm, x, cos, sin) for change in self.changes]
        return [
            F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, x, x))) for q in queries
        ]


def read_all(*changes, weight=True, tables=(1, 10, 1, 16)):
    x, cos, sin = torch.randn(2, 10, 32), torch.randn(tables), torch.randn(tables)
    gm = capture_one(Attention(*changes, weight=weight), x, cos, sin)
    sites = find_sites(gm.graph)
    assert len(sites) == len(changes)
    return [find_prologue(site.query) for site in sites]


def read(change, weight=True, tables=(1, 10, 1, 16)):
    return read_all(change, weight=weight, tables=tables)[0]


def rotate(x, cos, sin, dim=-1, sign=-1):
    if dim == -1:
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([sign * b if sign != -1 else -b, a], -1).flatten(3)
    else:
        a, b = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
        turned = torch.cat([-b, a], -1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize(("dim", "halves"), [(-1, False), (-2, True)])
def test_both_pairings_with_and_without_a_weight(dim, halves, weight):
    found = read(lambda norm, x, cos, sin: rotate(norm(x), cos, sin, dim), weight)
    (part,) = found.parts
    assert part.rotation.halves is halves and (part.norm.weight is not None) is weight
    assert part.norm.eps == 1e-5


def test_the_function_of_diffusers_is_read():
    def change(norm, x, cos, sin):
        return apply_rotary_emb(norm(x), (cos[0, :, 0], sin[0, :, 0]), sequence_dim=1)

    (part,) = read(change).parts
    assert describe(part) == ("head", "pairs")


@pytest.mark.parametrize("first", [True, False])
def test_some_tokens_of_one_part_are_rotated(first):
    def change(norm, x, cos, sin):
        x = norm(x)
        if first:
            return torch.cat([rotate(x[:, :6], cos, sin), x[:, 6:]], 1)
        return torch.cat([x[:, :4], rotate(x[:, 4:], cos, sin)], 1)

    (part,) = read(change, tables=(1, 6, 1, 16)).parts
    assert describe(part) == ("head", "pairs") and part.start == (0 if first else 4)


UNKNOWN = {
    "another sign": lambda norm, x, cos, sin: rotate(norm(x), cos, sin, sign=1),
    "a and b swapped": lambda norm, x, cos, sin: (
        norm(x) * cos + torch.stack([-norm(x)[..., 0::2], norm(x)[..., 1::2]], -1).flatten(3) * sin
    ),
    "a sum with another tensor": lambda norm, x, cos, sin: norm(x) * cos + x * sin,
    "layer norm": lambda norm, x, cos, sin: F.layer_norm(x, (16,)),
    "mean without the square": lambda norm, x, cos, sin: (
        x * torch.rsqrt(x.mean(-1, keepdim=True) + 1e-5)
    ),
    "mean over tokens": lambda norm, x, cos, sin: (
        x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)
    ),
    "cube": lambda norm, x, cos, sin: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5),
    "the square of another tensor": lambda norm, x, cos, sin: (
        x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5)
    ),
}


UNKNOWN |= {
    "a factor of one number": lambda norm, x, cos, sin: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight[:1]
    ),
    "eps times four": lambda norm, x, cos, sin: (
        x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-5, alpha=4))
    ),
    "a negative eps": lambda norm, x, cos, sin: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + -1e-5)
    ),
    "rounded to 8 bits": lambda norm, x, cos, sin: (
        norm(x.to(torch.float8_e4m3fn).to(torch.float32)).to(torch.float8_e4m3fn).float()
    ),
    "one position for all tokens": lambda norm, x, cos, sin: rotate(
        norm(x), cos[:, :1], sin[:, :1]
    ),
    "one factor for all channels": lambda norm, x, cos, sin: rotate(
        norm(x), cos[..., :1], sin[..., :1]
    ),
    "factors by keyword": lambda norm, x, cos, sin: torch.mul(norm(x), other=norm.weight),
    "a square by keyword": lambda norm, x, cos, sin: (
        x * torch.rsqrt(x.pow(exponent=2).mean(-1, keepdim=True) + 1e-5)
    ),
    "parts by keyword": lambda norm, x, cos, sin: torch.cat(
        tensors=[norm(x)[:, :4], norm(x)[:, 4:]], dim=1
    ),
    "out": lambda norm, x, cos, sin: torch.mul(
        x, torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), out=torch.empty_like(x)
    ),
    "the whole twice": lambda norm, x, cos, sin: torch.cat(
        [norm(x)[:, :], rotate(norm(x)[:, :], cos, sin)], 1
    )[:, :10],
}


def test_what_only_looks_alike_is_refused():
    found = dict(zip(UNKNOWN, read_all(*UNKNOWN.values()), strict=True))
    assert [name for name, prologue in found.items() if not isinstance(prologue, str)] == []


def test_tables_of_each_item_are_refused():
    found = read(lambda norm, x, cos, sin: rotate(norm(x), cos, sin), tables=(2, 10, 1, 16))
    assert isinstance(found, str)


def test_tables_of_each_head_are_refused():
    found = read(lambda norm, x, cos, sin: rotate(norm(x), cos, sin), tables=(1, 10, 2, 16))
    assert isinstance(found, str)


def test_another_dtype_is_refused():
    class Model(torch.nn.Module):
        def forward(self, x, y):
            q = F.rms_norm(x, (16,), None, 1e-6).float()
            return F.scaled_dot_product_attention(q, y, y)

    y = torch.randn(2, 2, 10, 16)
    (site,) = find_sites(capture_one(Model(), y.bfloat16(), y).graph)
    assert find_prologue(site.query) == "its dtype changes on the way"


@pytest.mark.parametrize("stop", [5, 7])
def test_slices_that_do_not_meet_are_refused(stop):
    def change(norm, x, cos, sin):
        x = norm(x)
        return torch.cat([rotate(x[:, :6], cos, sin), x[:, stop : stop + 4]], 1)

    assert isinstance(read(change, tables=(1, 6, 1, 16)), str)


def test_a_write_after_the_rotation_is_refused():
    def change(norm, x, cos, sin):
        a, b = norm(x).unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        cos, sin = cos[..., 0::2], sin[..., 1::2]
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = a * sin + b * cos
        out[:, 0] = 0.0
        return out

    assert isinstance(read(change), str)


def test_a_token_that_is_spread_over_tables_is_refused():
    def change(norm, x, cos, sin):
        return rotate(norm(x[:, :1]), cos, sin)

    assert isinstance(read(change), str)


def test_a_head_that_is_spread_over_others_is_refused():
    def change(norm, x, cos, sin):
        a, b = norm(x[:, :, :1]).unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = a * sin + b * cos
        return out

    assert isinstance(read(change, tables=(1, 10, 1, 8)), str)


def test_a_norm_of_another_library_is_not_taken_for_torchs():
    torch.library.define(
        "test_prologue::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor"
    )
    torch.library.register_fake("test_prologue::rms_norm", lambda x, weight, eps: x.clone())
    torch.library.impl("test_prologue::rms_norm", "CPU", lambda x, weight, eps: x * 2)

    def change(norm, x, cos, sin):
        return torch.ops.test_prologue.rms_norm(x, norm.weight, 1e-5)

    assert isinstance(read(change), str)


@pytest.mark.parametrize("table", ["cos", "weight"])
def test_a_table_that_is_written_to_later_is_refused(table):
    def change(norm, x, cos, sin):
        cos, weight = cos * 2, norm.weight * 2
        q = rotate(F.rms_norm(x, (16,), weight, 1e-5), cos, sin)
        (cos if table == "cos" else weight).neg_()
        return q

    assert "written to in place, by neg_" in read(change)


def test_a_write_to_what_a_write_returned_is_refused():
    def change(norm, x, cos, sin):
        x = x * 1.0
        q = norm(x.mul_(2.0))
        x.zero_()
        return q

    assert "written to in place, by zero_" in read(change)


def test_a_write_before_what_is_read_is_no_obstacle():
    def change(norm, x, cos, sin):
        x = x * 1.0
        x.mul_(2.0)
        return norm(x.view(2, 10, 2, 16))

    assert isinstance(read(change), Prologue)


def test_a_table_that_is_made_by_writes_is_read():
    def change(norm, x, cos, sin):
        table = torch.zeros_like(cos)
        table[:, 1:] = cos[:, 1:]
        return rotate(norm(x), table, sin)

    assert isinstance(read(change), Prologue)


def test_a_kernel_of_the_users_that_writes_to_it_is_seen():
    x, cos, sin = torch.randn(2, 10, 32), torch.randn(1, 10, 1, 16), torch.randn(1, 10, 1, 16)
    gm = capture_one(Attention(lambda norm, x, cos, sin: norm(x)), x, cos, sin)
    (site,) = find_sites(gm.graph)
    assert isinstance(find_prologue(site.query), Prologue)
    with gm.graph.inserting_before(site.node):
        # as Dynamo writes a Triton kernel
        gm.graph.call_function(
            torch.ops.higher_order.triton_kernel_wrapper_mutation,
            kwargs={"kernel_idx": 0, "grid": [(1, 1, 1)], "kwargs": {"x": site.query}},
        )
    assert "in place, by triton_kernel" in find_prologue(site.query)


def test_a_start_that_may_be_negative_is_refused():
    def change(norm, x, cos, sin):
        n, x = cos.shape[1], norm(x)
        return torch.cat([x[:, :-n], rotate(x[:, -n:], cos, sin)], 1)

    x, cos, sin = torch.randn(2, 10, 32), torch.randn(1, 6, 1, 16), torch.randn(1, 6, 1, 16)
    for dynamic in (False, True):
        gm = capture_one(Attention(change, weight=False), x, cos, sin, dynamic=dynamic)
        (site,) = find_sites(gm.graph)
        assert isinstance(find_prologue(site.query), str)
