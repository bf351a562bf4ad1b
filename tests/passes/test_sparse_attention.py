"""Graph in, graph out: what the pass writes, on real graphs and without any compiler."""

from __future__ import annotations

import pytest
import torch

import dit_opt.backend  # noqa: F401 - registers the operators
from dit_opt.facts.sites import find_sites
from dit_opt.facts.tokens import find_tokens
from dit_opt.options import Options
from dit_opt.passes.choose_sites import choose_sites
from dit_opt.passes.graph_edit import copy_graph
from dit_opt.passes.plan_nodes import make_blank_plan
from dit_opt.passes.sparse_attention import name_heads, sparse_attention
from dit_opt.passes.sparse_site import SparseForm
from tests.graphs import capture_one, capture_tiny
from zoo.small import hunyuan_video, wan

OPS = torch.ops.ditopt
SEARCH = SparseForm()


def rewrite(gm, form=SEARCH, **options):
    copy = copy_graph(gm)
    sites = find_sites(copy.graph)
    tokens = find_tokens(copy.graph, sites)
    chosen = choose_sites(copy, sites, tokens, Options(min_tokens=0, **options))
    sparse = [c.sparse for c in chosen if c.sparse]
    return copy, sparse_attention(copy, sparse, form)


def count(gm, target):
    return len(gm.graph.find_nodes(op="call_function", target=target))


def sdpa(gm):
    return count(gm, torch.nn.functional.scaled_dot_product_attention)


def outputs(gm):
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0]


def test_searching_sites_become_plan_gather_attention_scatter():
    _, gm = capture_tiny(wan)
    assert sdpa(gm) == 4
    new, changed = rewrite(gm, router="rainfusion")
    assert changed == 2 and sdpa(new) == 2
    for op, times in (
        (OPS.rainfusion_recognize_v1.default, 2),
        (OPS.rainfusion_plan_v1.default, 2),
        (OPS.gather_tokens_v1.default, 6),
        (OPS.block_sparse_attention_v3.default, 2),
        (OPS.scatter_tokens_v1.default, 2),
    ):
        assert count(new, op) == times
    assert len(outputs(new)) == len(outputs(gm)) + 3 * 2


def test_reused_plans_come_in_as_inputs():
    _, gm = capture_tiny(wan)
    new, _ = rewrite(gm, SparseForm(reuse=True), router="rainfusion")
    assert count(new, OPS.rainfusion_recognize_v1.default) == 0
    added = len(new.graph.find_nodes(op="placeholder")) - len(gm.graph.find_nodes(op="placeholder"))
    assert added == 2 and len(outputs(new)) == len(outputs(gm))
    plan = new.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
    assert plan.shape == (2, 2) and plan.dtype == torch.int32


def test_orders_of_heads_become_plan_gather_attention_scatter():
    _, gm = capture_tiny(wan)
    new, changed = rewrite(gm, router="headwise")
    assert changed == 2 and sdpa(new) == 2
    for op, times in (
        (OPS.headwise_plan_v1.default, 2),
        (OPS.headwise_rows_v1.default, 2),
        (OPS.gather_tokens_v1.default, 6),
        (OPS.scatter_tokens_v1.default, 2),
    ):
        assert count(new, op) == times
    assert count(new, OPS.pack_plan_v1.default) == 2
    assert len(outputs(new)) == len(outputs(gm)) + 4 * 2
    reused, _ = rewrite(gm, SparseForm(reuse=True), router="headwise")
    assert count(reused, OPS.headwise_plan_v1.default) == 0
    assert count(reused, OPS.headwise_rows_v1.default) == 2
    assert count(reused, OPS.unpack_plan_v1.default) == 2
    added = reused.graph.find_nodes(op="placeholder")[-2:]
    assert [n.name.rsplit("_", 1)[0] for n in added] == ["ditopt_words", "ditopt_order"]


def test_a_variant_can_be_told_to_search_or_to_reuse():
    _, gm = capture_tiny(wan)
    new, _ = rewrite(gm, SparseForm(asks=True), router="headwise")
    assert count(new, OPS.headwise_refresh_v1.default) == 2
    for op in (OPS.headwise_plan_v1, OPS.pack_plan_v1, OPS.unpack_plan_v1):
        assert count(new, op.default) == 0
    added = new.graph.find_nodes(op="placeholder")[-3:]
    names = [n.name.rsplit("_", 1)[0] for n in added]
    assert names == ["ditopt_fresh", "ditopt_words", "ditopt_order"]
    flag, *plan = (n.meta["example_value"] for n in added)
    assert flag.shape == () and flag.dtype == torch.bool and flag.device.type == "cpu"
    # what stands for a plan before there is one has the shapes of one
    batch, heads, tokens, _ = (
        new.graph.find_nodes(op="call_function", target=OPS.headwise_refresh_v1.default)[0]
        .args[3]
        .meta["example_value"]
        .shape
    )
    assert [x.shape for x in make_blank_plan(batch, heads, tokens)] == [x.shape for x in plan]
    searched, _ = rewrite(gm, router="headwise")
    assert len(outputs(new)) == len(outputs(searched))


def test_keeping_everything_moves_no_tokens():
    _, gm = capture_tiny(wan)
    new, _ = rewrite(gm, density=1)
    assert count(new, OPS.dense_plan_v1.default) == 2
    assert count(new, OPS.gather_tokens_v1.default) == 0
    assert len(outputs(new)) == len(outputs(gm))


def test_the_original_graph_is_left_alone():
    _, gm = capture_tiny(wan)
    before = str(gm.graph)
    rewrite(gm)
    assert str(gm.graph) == before


def test_a_key_padding_mask_becomes_a_bias_in_each_heads_order():
    _, gm = capture_tiny(hunyuan_video)
    new, changed = rewrite(gm)
    assert changed == 2
    assert count(new, OPS.gather_bias_v1.default) == 2
    for node in new.graph.find_nodes(
        op="call_function", target=OPS.block_sparse_attention_v3.default
    ):
        assert node.args[5] is not None


@pytest.mark.parametrize("make", [wan, hunyuan_video])
@pytest.mark.parametrize("router", ["headwise", "rainfusion", "subblock"])
def test_the_rewritten_graph_that_keeps_everything_computes_dense_attention(make, router):
    """Of six blocks of queries and twelve or more of keys; the orders of tokens must cancel."""
    tiny = make(batch=2, grid=(3, 14, 18))

    def backend(gm, inputs):
        new, changed = rewrite(gm, router=router, quality=0.999999)
        assert changed == 2
        kept = len(outputs(gm))
        return lambda *args: new(*args)[:kept]

    torch.compiler.reset()
    out = tiny(torch.compile(tiny.model, backend=backend))
    torch.compiler.reset()
    torch.testing.assert_close(out, tiny(), rtol=1e-5, atol=1e-5)


def test_masked_queries_attend_to_nothing():
    def attend(x, valid):
        mask = valid[:, None, None, :] & valid[:, None, :, None]
        return torch.nn.functional.scaled_dot_product_attention(x, 2 * x, -x, attn_mask=mask)

    torch.manual_seed(0)
    x = torch.randn(2, 2, 24, 16)
    valid = torch.arange(24).expand(2, 24) < torch.tensor([[20], [24]])
    gm = capture_one(attend, x, valid)
    new, changed = rewrite(gm, density=1)
    assert changed == 1 and sdpa(new) == 0
    order = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    out = new(*({"l_x_": x, "l_valid_": valid}[name] for name in order))[0]
    torch.testing.assert_close(out, attend(x, valid), rtol=1e-5, atol=1e-5)
    assert not out[0, :, 20:].any()


def test_attention_without_a_heads_dimension_is_served():
    def attend(x):
        return torch.nn.functional.scaled_dot_product_attention(x, 2 * x, -x, scale=0.3)

    torch.manual_seed(0)
    x = torch.randn(4, 24, 16)
    gm = capture_one(attend, x)
    new, changed = rewrite(gm, density=1)
    assert changed == 1
    torch.testing.assert_close(new(x)[0], attend(x), rtol=1e-5, atol=1e-5)


def test_heads_have_names():
    layout = (3, 4, 5, 0, 60)
    assert name_heads("rainfusion", layout, [torch.tensor([[-1, -1]])]) == ["dense", "dense"]
    plan = [torch.empty(0), torch.tensor([[2, 0]])]
    assert name_heads("headwise", layout, plan) == ["cubes", "raster"]
    assert name_heads("subblock", layout, plan[:2]) is None


class Cast(torch.nn.Module):
    """Attention under autocast over queries and keys, and values, of given dtypes."""

    def __init__(self, qk, v, flat=False):
        super().__init__()
        self.qk, self.v, self.flat = qk, v, flat

    def forward(self, x):
        x = x.flatten(0, 1) if self.flat else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q, v = x.to(self.qk), x.to(self.v)
            return torch.nn.functional.scaled_dot_product_attention(q, q, v)


@pytest.mark.parametrize("qk", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_under_autocast_tensors_get_the_dtype_that_the_call_has(qk, v, flat):
    model, x = Cast(qk, v, flat), torch.randn(2, 2, 192, 16)
    new, changed = rewrite(capture_one(model, x), density=1)
    assert changed == 1
    (out,), wanted = new(x), model(x)
    assert out.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.02)


def test_without_autocast_nothing_is_converted():
    _, gm = capture_tiny(wan)
    before = len(gm.graph.find_nodes(op="call_method", target="to"))
    new, _ = rewrite(gm, density=1)
    assert len(new.graph.find_nodes(op="call_method", target="to")) == before
