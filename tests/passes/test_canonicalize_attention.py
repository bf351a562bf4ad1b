from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_opt.decisions import AttentionReason, Decision, RewriteReason
from dit_opt.facts.sites import Form, find_sites
from dit_opt.options import Options
from dit_opt.passes.base import Match
from dit_opt.passes.canonicalize_attention import CanonicalizeAttention
from dit_opt.program.program import Program
from dit_opt.program.spec import check_graph, list_unvalued
from tests.graphs import capture_one
from zoo import small

Q = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(2, 1, 1, 8).index_fill(-1, torch.tensor([5, 7]), float("-inf"))
FLAT = Q.reshape(6, 8, 4)
FLAT_MASK = MASK.reshape(2, 1, 8).repeat_interleave(3, 0)


def count(gm, target) -> int:
    ops = [n.target for n in gm.graph.nodes]
    return sum(t is target or t == target for t in ops)


def canonicalize(gm):
    """A copy with every readable site as one call, whatever it is worth, and their number."""
    program = Program(gm)
    unvalued = list_unvalued(program.main)
    decision = Decision("", "", RewriteReason.REWRITTEN)
    sites = [s for s in program.facts.sites if s.form is Form.DECOMPOSED and s.refusal is None]
    matches = [Match(decision, site.node, site) for site in sites]
    CanonicalizeAttention().rewrite(program, matches, Options())
    check_graph(program.main, "canonicalize_attention", unvalued)
    program.main.gm.recompile()
    return program.main.gm, len(matches)


def scaled(q, mask):
    return (q @ q.transpose(-1, -2) * 0.3 + mask).softmax(-1) @ q


def unscaled(q, mask):
    return F.softmax(torch.matmul(q, q.mT), dim=-1) @ q


def einsum(q, mask):
    scores = torch.einsum("bhid,bhjd->bhij", q, q) / 2
    return torch.einsum("bhij,bhjd->bhid", (mask + scores).softmax(-1), q)


def cast(q, mask):
    scores = (q.float() @ q.float().mT) * 0.5
    return scores.softmax(-1, dtype=torch.float32).type_as(q) @ q


def batched(q, mask):
    scores = torch.baddbmm(mask, q, q.transpose(-1, -2), beta=1, alpha=0.3)
    return torch.bmm(scores.softmax(-1), q)


def batched_empty(q, mask):
    empty = torch.empty(6, 8, 8)
    scores = torch.baddbmm(empty, q, q.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(-1), q)


@pytest.mark.parametrize(
    ("function", "q", "mask"),
    [
        (scaled, Q, MASK),
        (unscaled, Q, MASK),
        (einsum, Q, MASK),
        (cast, Q, MASK),
        (batched, FLAT, FLAT_MASK),
        (batched_empty, FLAT, FLAT_MASK),
    ],
)
def test_one_call_with_the_same_result(function, q, mask):
    gm = capture_one(function, q, mask)
    before = len(gm.graph.nodes)
    assert count(gm, "softmax") + count(gm, F.softmax) == 1
    assert count(gm, F.scaled_dot_product_attention) == 0
    args = {"l_q_": q, "l_mask_": mask}
    inputs = [args[n.name] for n in gm.graph.find_nodes(op="placeholder")]
    expected = gm(*inputs)[0]

    gm, changed = canonicalize(gm)

    assert changed == 1
    assert count(gm, F.scaled_dot_product_attention) == 1
    assert count(gm, "softmax") + count(gm, F.softmax) == 0
    assert len(gm.graph.nodes) < before + 4
    torch.testing.assert_close(gm(*inputs)[0], expected, rtol=1e-5, atol=1e-6)
    (site,) = find_sites(gm.graph)
    assert site.form is Form.SDPA and site.refusal is None
    example = site.query.meta["example_value"]
    assert example.dim() == 4 and tuple(example.shape[-2:]) == (8, 4)


def test_nothing_of_the_old_attention_stays():
    gm, _ = canonicalize(capture_one(batched_empty, FLAT, FLAT_MASK))
    targets = [str(n.target) for n in gm.graph.nodes if n.op.startswith("call")]
    assert not any(word in t for t in targets for word in ("empty", "transpose", "baddbmm", "bmm"))


def fused(q, k, v, **kwargs):
    """Attention that lies in memory as fused kernels write it."""
    out = F.scaled_dot_product_attention(q, k, v, **kwargs)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def canonicalize_fused(gm):
    gm, changed = canonicalize(gm)
    assert changed == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    node.target = fused
    gm.recompile()
    return gm


def attention(q):
    return (q @ q.mT).softmax(-1) @ q


def viewed(q):
    return attention(q).view(6, 8, 4)


def viewed_after_a_cast(q):
    return attention(q).double().float().view(6, 32)


def viewed_as_written(q):
    out = attention(q)
    out.reshape(6, 8, 4).mul_(2.0)
    return out.sum(-1)


def kept_apart_from_a_write(q):
    out = attention(q)
    out.transpose(1, 2).reshape(2, 8, 12).zero_()
    return out.sum(-1)


def strides_read(q):
    out = attention(q)
    return torch.as_strided(out, (8, 12), (12, 1))


def strides_returned(q):
    return attention(q)


@pytest.mark.parametrize(
    "function",
    [
        viewed,
        viewed_after_a_cast,
        viewed_as_written,
        kept_apart_from_a_write,
        strides_read,
        strides_returned,
    ],
)
def test_the_result_lies_in_memory_as_before(function):
    gm = canonicalize_fused(capture_one(function, Q))
    (out,), expected = gm(Q), function(Q)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.stride() == expected.stride()


@pytest.mark.parametrize(
    "join",
    [
        lambda out: out.transpose(1, 2).reshape(2, 8, 12),
        lambda out: out.permute(0, 2, 1, 3).to(torch.float64).flatten(2),
        lambda out: torch.permute(out, [0, 2, 1, 3]).contiguous().view(2, 8, 12),
        lambda out: out.swapaxes(-3, -2).flatten(-2),
    ],
)
def test_heads_that_are_joined_cost_no_copy(join):
    gm = capture_one(lambda q: join(attention(q)), Q)
    before = count(gm, "contiguous")
    gm = canonicalize_fused(gm)
    assert count(gm, "contiguous") == before
    (out,), expected = gm(Q), join(attention(Q))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.stride() == expected.stride()


def decomposed_dit():
    """A model that writes attention out."""
    from diffusers.models.attention_processor import AttnProcessor

    tiny = small.dit()
    for block in tiny.model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    return tiny


def test_new_nodes_keep_module_line_and_value():
    tiny = decomposed_dit()
    gm = capture_one(tiny.model, **tiny.inputs)
    old = find_sites(gm.graph)
    assert [s.form for s in old] == [Form.DECOMPOSED] * 2
    gm, changed = canonicalize(gm)
    assert changed == 2
    new = find_sites(gm.graph)
    assert [(s.form, s.index, s.module, s.source) for s in new] == [
        (Form.SDPA, s.index, s.module, s.source) for s in old
    ]
    assert tuple(new[0].node.meta["example_value"].shape) == (2, 1, 36, 16)


def test_whole_model_stays_the_same():
    tiny = decomposed_dit()
    expected = tiny()

    def backend(gm, inputs):
        copied, changed = canonicalize(gm)
        assert changed == 2
        return copied.forward

    torch.compiler.reset()
    out = tiny(torch.compile(tiny.model, backend=backend))
    torch.compiler.reset()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_dynamic_shapes():
    gm, changed = canonicalize(capture_one(batched, FLAT, FLAT_MASK, dynamic=True))
    assert changed == 1
    sizes = gm.graph.find_nodes(op="placeholder")
    values = {"l_q_": FLAT, "l_mask_": FLAT_MASK}
    symbols = {str(n.meta["example_value"]): n for n in sizes}
    assert symbols
    inputs = [values[n.name] if n.name in values else FLAT.shape[_dim_of(n, sizes)] for n in sizes]
    torch.testing.assert_close(gm(*inputs)[0], batched(FLAT, FLAT_MASK), rtol=1e-5, atol=1e-6)


def _dim_of(symbol, placeholders) -> int:
    q = next(n for n in placeholders if n.name == "l_q_").meta["example_value"]
    return [str(s) for s in q.shape].index(str(symbol.meta["example_value"]))


def find(gm, **options):
    return CanonicalizeAttention().find(Program(gm).facts, Options(min_tokens=0, **options))


def test_sites_that_stay_dense_are_left_as_they_are():
    """The sums of one call run in another order."""
    tiny = decomposed_dit()
    gm = capture_one(tiny.model, **tiny.inputs)
    for options, reason in (
        ({}, RewriteReason.REWRITTEN),
        ({"router": "dense"}, RewriteReason.STAYS_DENSE),
    ):
        found = find(gm, **options)
        assert [m.decision.reason for m in found] == [reason] * 2
        assert all("attn1" in m.decision.module and m.decision.source for m in found)


def test_attention_that_is_one_call_already_is_no_place_to_look_at():
    assert find(capture_one(lambda q: F.scaled_dot_product_attention(q, q, q), Q)) == []


def test_attention_whose_weights_are_used_elsewhere_stays():
    def leaky(q):
        weights = (q @ q.mT).softmax(-1)
        return weights, weights @ q

    gm = capture_one(leaky, Q)
    (site,) = find_sites(gm.graph)
    assert site.refusal is AttentionReason.SHARED_INTERMEDIATE
    (match,) = find(gm, density=1)
    assert match.decision.reason is RewriteReason.STAYS_DENSE
    assert canonicalize(gm)[1] == 0


def test_no_sites_no_change():
    gm = capture_one(lambda q: q + 1, Q)
    new, changed = canonicalize(gm)
    assert changed == 0 and new.code == gm.code
