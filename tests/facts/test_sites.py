from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_opt.decisions import AttentionReason
from dit_opt.facts.sites import Form, find_sites
from tests.graphs import capture_one, capture_tiny
from zoo import small

Q = torch.randn(1, 2, 8, 4)
FLAT = torch.randn(2, 8, 4)


def find_one(function, *args, **kwargs):
    sites = find_sites(capture_one(function, *args, **kwargs).graph)
    assert len(sites) == 1
    return sites[0]


def aten(q):
    return torch.ops.aten.scaled_dot_product_attention(q, q, q, scale=0.3)


def aten_overload(q):
    return torch.ops.aten.scaled_dot_product_attention.default(q, q, q, scale=0.3)


def positional(q):
    return F.scaled_dot_product_attention(q, q, q, None, 0.0, False, scale=0.3)


def keywords(q):
    return F.scaled_dot_product_attention(
        query=q, key=q, value=q, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3
    )


@pytest.mark.parametrize("function", [aten, aten_overload, positional, keywords])
def test_every_spelling_of_sdpa(function):
    site = find_one(function, Q)
    assert site.form is Form.SDPA and site.refusal is None
    assert (site.query, site.key, site.value) == (site.query,) * 3
    assert site.query.op == "placeholder"
    assert site.mask is None and site.scale == 0.3
    assert (site.dropout_p, site.is_causal, site.enable_gqa) == (0.0, False, False)


def test_mask_gqa_and_default_scale():
    def attend(q, k, mask):
        return F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

    site = find_one(attend, Q, Q[:, :1], torch.zeros(1, 1, 1, 8))
    assert site.enable_gqa and site.scale is None
    assert site.mask is not None and "mask" in site.mask.name


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"is_causal": True}, AttentionReason.CAUSAL), ({"dropout_p": 0.1}, AttentionReason.DROPOUT)],
)
def test_calls_that_refuse_by_themselves(arguments, reason):
    site = find_one(lambda q: F.scaled_dot_product_attention(q, q, q, **arguments), Q)
    assert site.form is Form.SDPA and site.refusal is reason


def test_a_scale_computed_in_the_graph():
    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, scale=q.shape[-2] ** -0.5)

    assert find_one(attend, Q, dynamic=True).refusal is AttentionReason.DYNAMIC_SCALE


def test_pinned_kernel():
    def attend(q):
        with sdpa_kernel(SDPBackend.MATH):
            a = F.scaled_dot_product_attention(q, q, q)
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                b = F.scaled_dot_product_attention(a, q, q)
            c = F.scaled_dot_product_attention(b, q, q)
        return F.scaled_dot_product_attention(c, q, q)

    sites = find_sites(capture_one(attend, Q).graph)
    assert [s.refusal for s in sites] == [AttentionReason.PINNED_BACKEND] * 3 + [None]
    assert [s.detail for s in sites] == ["MATH", "FLASH_ATTENTION, MATH", "MATH", ""]


def test_multihead_attention():
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    site = find_one(lambda x: module(x, x, x)[0], torch.randn(1, 5, 8))
    assert site.form is Form.MULTIHEAD and site.refusal is AttentionReason.OPAQUE_MHA
    assert site.query is not None


def test_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    site = find_one(lambda q: flex_attention(q, q, q), torch.randn(1, 2, 128, 16))
    assert site.form is Form.FLEX and site.refusal is AttentionReason.FLEX
    assert site.query.op == "placeholder"


@torch.library.custom_op("tests_sites::flash_attn_forward", mutates_args=())
def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


@flash.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def test_foreign_op():
    site = find_one(lambda q: flash(q, q + 1, q), Q)
    assert site.form is Form.FOREIGN and site.refusal is AttentionReason.FOREIGN_OP
    assert site.detail == "tests_sites.flash_attn_forward"
    assert site.key is not site.query


def by_operator(q, mask):
    return (q @ q.transpose(-1, -2) * 0.5 + mask).softmax(-1) @ q


def by_function(q, mask):
    scores = torch.matmul(q, q.permute(0, 1, 3, 2)) / 2.0
    return torch.matmul(F.softmax(mask + scores, dim=3), q)


def by_einsum(q, mask):
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, q) * 0.5
    return torch.einsum("bhij,bhjd->bhid", (scores + mask).softmax(dim=-1), q)


def in_place(q, mask):
    scores = q @ q.transpose(2, 3)
    scores *= 0.5
    scores += mask
    return F.dropout(scores.softmax(-1), 0.1, training=False) @ q


@pytest.mark.parametrize("function", [by_operator, by_function, by_einsum, in_place])
def test_every_spelling_of_decomposed(function):
    site = find_one(function, Q, torch.zeros(1, 1, 1, 8))
    assert site.form is Form.DECOMPOSED and site.refusal is None
    assert site.query.name == site.key.name == site.value.name == "l_q_"
    assert site.mask.name == "l_mask_" and site.scale == 0.5


def test_decomposed_batches_of_heads():
    def attend(q, k, v):
        bias = torch.empty(2, 8, 8)
        scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=0, alpha=0.5)
        return torch.bmm(scores.softmax(dim=-1), v)

    site = find_one(attend, FLAT, FLAT + 1, FLAT + 2)
    assert site.form is Form.DECOMPOSED and site.refusal is None
    assert [n.name for n in (site.query, site.key, site.value)] == ["l_q_", "l_k_", "l_v_"]
    assert site.scale == 0.5 and site.mask is None


def test_decomposed_mask_in_baddbmm():
    def attend(q, mask):
        scores = torch.baddbmm(mask, q, q.transpose(-1, -2), beta=1, alpha=0.5)
        return torch.bmm(scores.softmax(dim=-1), q)

    assert find_one(attend, FLAT, torch.zeros(2, 1, 8)).mask.name == "l_mask_"


def test_decomposed_upcast_of_q_and_k_is_undone():
    def attend(q):
        scores = q.float() @ q.transpose(-1, -2).float()
        return scores.softmax(-1).to(q.dtype) @ q

    site = find_one(attend, Q.bfloat16())
    # the key is cast after its transpose, which one call cannot say
    assert site.refusal is AttentionReason.UNREADABLE_SCORES

    def attend_diffusers(q):
        query, key = q.float(), q.float()
        return (query @ key.transpose(-1, -2)).softmax(-1).to(q.dtype) @ q

    site = find_one(attend_diffusers, Q.bfloat16())
    assert site.refusal is None
    assert site.query.name == site.key.name == "l_q_"


def scores_returned(q):
    scores = q @ q.mT
    return scores, scores.softmax(-1) @ q


def weights_returned(q):
    weights = (q @ q.mT).softmax(-1)
    return weights, weights @ q


def scores_written(q):
    scores = q @ q.mT
    scores[..., 0] = 0.0
    return scores.softmax(-1) @ q


@pytest.mark.parametrize("function", [scores_returned, weights_returned, scores_written])
def test_shared_intermediates_refuse(function):
    site = find_one(function, Q)
    assert site.form is Form.DECOMPOSED and site.refusal is AttentionReason.SHARED_INTERMEDIATE
    assert site.detail


def masked_fill(q, mask):
    return (q @ q.mT).masked_fill(mask, float("-inf")).softmax(-1) @ q


def mask_scaled_too(q, mask):
    return ((q @ q.mT + mask.float()) * 0.5).softmax(-1) @ q


def boolean_added(q, mask):
    return (q @ q.mT + mask).softmax(-1) @ q


@pytest.mark.parametrize("function", [masked_fill, mask_scaled_too, boolean_added])
def test_unreadable_scores_are_reported(function):
    site = find_one(function, Q, torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    assert site.form is Form.DECOMPOSED and site.refusal is AttentionReason.UNREADABLE_SCORES
    assert site.query is None


def test_decomposed_dropout_refuses():
    site = find_one(lambda q: F.dropout((q @ q.mT).softmax(-1), 0.1) @ q, Q)
    assert site.refusal is AttentionReason.DROPOUT and site.dropout_p == 0.1


def test_decomposed_broadcast_batch_refuses():
    site = find_one(lambda q, k: (q @ k.mT).softmax(-1) @ k, Q, Q[:, :1])
    assert site.refusal is AttentionReason.UNSUPPORTED_SHAPE


@pytest.mark.parametrize(
    "function",
    [
        lambda q: q @ q.mT @ q,
        lambda q: q.softmax(-1) @ q.mT,
        lambda q: (q @ q.mT).softmax(-2) @ q,
        lambda q: (q @ q.mT).softmax(-1) + 1,
    ],
)
def test_other_products_are_no_attention(function):
    assert find_sites(capture_one(function, Q).graph) == ()


def test_dynamic_shapes_add_no_guard():
    graph = capture_one(in_place, Q, torch.zeros(1, 1, 1, 8), dynamic=True)
    environment = next(
        n.meta["example_value"].node.shape_env
        for n in graph.graph.find_nodes(op="placeholder")
        if isinstance(n.meta["example_value"], torch.SymInt)
    )
    before = len(environment.guards)
    (site,) = find_sites(graph.graph)
    assert site.refusal is None
    assert len(environment.guards) == before


@pytest.mark.parametrize("make", small.ALL, ids=lambda make: make.__name__)
def test_models(make):
    tiny, gm = capture_tiny(make)
    sites = find_sites(gm.graph)
    assert len(sites) == tiny.n_sites
    assert [s.index for s in sites] == list(range(tiny.n_sites))
    for site in sites:
        assert site.form is Form.SDPA and site.refusal is None
        owner = tiny.model.get_submodule(site.module)
        assert "Attention" in type(owner).__name__
        file, line = site.source.split(":")
        assert file.endswith(".py") and int(line) > 0
    assert len({s.module for s in sites}) == tiny.n_sites


def test_model_with_old_processors():
    from diffusers.models.attention_processor import AttnProcessor

    tiny = small.dit()
    for block in tiny.model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    sites = find_sites(capture_one(tiny.model, **tiny.inputs).graph)
    assert [s.form for s in sites] == [Form.DECOMPOSED] * tiny.n_sites
    assert [s.refusal for s in sites] == [None] * tiny.n_sites
    assert sites[1].module == "transformer_blocks.1.attn1"


def test_names_in_a_lone_block():
    tiny = small.wan()
    block = tiny.model.blocks[1]
    x, text = torch.randn(1, 60, 48), torch.randn(1, 7, 48)
    rotary = tuple(torch.randn(1, 60, 1, 24) for _ in range(2))
    sites = find_sites(capture_one(block, x, text, torch.randn(1, 6, 48), rotary).graph)
    assert [s.module for s in sites] == ["attn1", "attn2"]
    assert sites[0].source.startswith("transformer_wan.py:")


class Attend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, q):
        q = self.linear(q)
        return F.scaled_dot_product_attention(q, q, q)


class Inside(torch.nn.Module):
    """Attention in a region of its own, and then attention outside of any."""

    def __init__(self, region):
        super().__init__()
        self.inner = Attend()
        self.region = region

    def forward(self, q):
        inner = self.region(self.inner, q)
        return F.scaled_dot_product_attention(inner, q, q)


def choose(function, q):
    return torch.cond(q.sum() > 0, function, lambda q: q.clone(), (q,))


def call_again(function, q):
    return torch.utils.checkpoint.checkpoint(function, q, use_reentrant=False)


@pytest.mark.parametrize(
    "region, name",
    [
        (choose, "cond"),
        (call_again, "tag_activation_checkpoint"),
        (lambda function, q: choose(lambda q: choose(function, q), q), "cond"),
    ],
    ids=["cond", "checkpoint", "cond in cond"],
)
def test_attention_inside_a_region_has_a_reason(region, name):
    inner, outer = find_sites(capture_one(Inside(region), Q).graph)
    assert inner.refusal is AttentionReason.INSIDE_REGION and inner.detail == name
    assert inner.node.graph is not outer.node.graph and inner.query is not None
    assert outer.refusal is None and (inner.index, outer.index) == (0, 1)


def test_each_call_of_a_region_counts():
    # one that is called once is inlined
    def model(q):
        region = torch.compiler.nested_compile_region(
            lambda q: F.scaled_dot_product_attention(q, q, q)
        )
        return region(region(q))

    found = find_sites(capture_one(model, Q).graph)
    assert [site.refusal for site in found] == [AttentionReason.INSIDE_REGION] * 2
    assert {site.detail for site in found} == {"invoke_subgraph"}


def test_a_region_without_attention_has_no_site():
    assert not find_sites(capture_one(lambda q: choose(torch.sin, q), Q).graph)
