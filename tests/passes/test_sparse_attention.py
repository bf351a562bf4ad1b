"""Graph in, graph out: what the pass writes, on real graphs and without any compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dit_opt.backend  # noqa: F401 - registers the operators
from dit_opt.options import OptionError
from dit_opt.passes.sparse_attention import SparseAttention
from dit_opt.program.modes import Mode
from dit_opt.routers.headwise import Headwise
from tests.graphs import capture_one, capture_tiny
from tests.programs import count_calls, list_slots, run_passes
from zoo.small import hunyuan_video, wan

OPS = torch.ops.ditopt
# of each site
STATISTICS = ["attention.recall", "attention.plan_density", "attention.density"]


@pytest.fixture
def unswitched(monkeypatch):
    """As on a GPU: a search and a reuse are variants of their own."""
    monkeypatch.setattr(Headwise, "switchable", False)


def rewrite(gm, mode=Mode.SEARCH, **options):
    """The variant of a mode by this pass alone, and how many sites it changes."""
    record, lowering = run_passes(gm, [SparseAttention()], **options)
    return lowering.make_variant(mode), record.passes[0].changed


def sdpa(gm):
    return count_calls(gm, F.scaled_dot_product_attention)


def count_state(variant, gm):
    """Inputs and outputs beside those of the model."""
    new = variant.graph.gm.graph
    inputs, outputs = (
        [len(g.find_nodes(op="placeholder")), len(g.find_nodes(op="output")[0].args[0])]
        for g in (new, gm.graph)
    )
    return tuple(a - b for a, b in zip(inputs, outputs, strict=True))


def test_searching_sites_become_plan_gather_attention_scatter():
    _, gm = capture_tiny(wan)
    assert sdpa(gm) == 4
    variant, changed = rewrite(gm, router="rainfusion")
    new = variant.graph.gm
    assert changed == 2 and sdpa(new) == 2
    for op, times in (
        (OPS.rainfusion_recognize_v1.default, 2),
        (OPS.rainfusion_plan_v1.default, 2),
        (OPS.gather_tokens_v1.default, 6),
        (OPS.block_sparse_attention_v3.default, 2),
        (OPS.scatter_tokens_v1.default, 2),
    ):
        assert count_calls(new, op) == times
    assert list_slots(variant) == ([], ["rainfusion.choice", *STATISTICS] * 2)
    assert count_state(variant, gm) == (0, 4 * 2)


def test_every_mode_but_dense_is_lowered():
    _, gm = capture_tiny(wan)
    variant, _ = rewrite(gm, Mode.DENSE)
    assert str(variant.graph.gm.graph) == str(gm.graph)
    assert count_state(variant, gm) == (0, 0)


def test_reused_plans_come_in_as_inputs():
    _, gm = capture_tiny(wan)
    variant, _ = rewrite(gm, Mode.REUSE, router="rainfusion")
    new = variant.graph.gm
    assert count_calls(new, OPS.rainfusion_recognize_v1.default) == 0
    reads = ["rainfusion.choice", "attention.plan_density"]
    assert list_slots(variant) == (reads * 2, ["attention.density"] * 2)
    assert count_state(variant, gm) == (2 * 2, 2)
    examples = [given.example for given in variant.graph.inputs]
    assert [(tuple(x.shape), x.dtype) for x in examples[:2]] == [
        ((2, 2), torch.int32),
        ((2, 2), torch.float32),
    ]


def test_slots_belong_to_a_parameter_of_their_layer():
    _, gm = capture_tiny(wan)
    variant, _ = rewrite(gm, router="rainfusion")
    placeholders = gm.graph.find_nodes(op="placeholder")
    anchors = {write.ref.place: placeholders[write.ref.anchor] for write in variant.graph.writes}
    assert list(anchors) == [0, 2]
    for layer, node in enumerate(anchors.values()):
        assert f"blocks_modules_{layer}_" in node.name and "parameters" in node.name


def test_orders_of_heads_become_plan_gather_attention_scatter(unswitched):
    _, gm = capture_tiny(wan)
    variant, changed = rewrite(gm, router="headwise")
    new = variant.graph.gm
    assert changed == 2 and sdpa(new) == 2
    for op, times in (
        (OPS.headwise_plan_v2.default, 2),
        (OPS.headwise_rows_v1.default, 2),
        (OPS.gather_tokens_v1.default, 6),
        (OPS.scatter_tokens_v1.default, 2),
        (OPS.pack_plan_v1.default, 2),
    ):
        assert count_calls(new, op) == times
    assert list_slots(variant) == ([], ["headwise.words", "headwise.order", *STATISTICS] * 2)
    variant, _ = rewrite(gm, Mode.REUSE, router="headwise")
    for op, times in (
        (OPS.headwise_plan_v2.default, 0),
        (OPS.headwise_rows_v1.default, 2),
        (OPS.unpack_plan_v1.default, 2),
    ):
        assert count_calls(variant.graph.gm, op) == times
    reads = ["headwise.words", "headwise.order", "attention.plan_density"]
    assert list_slots(variant) == (reads * 2, ["attention.density"] * 2)


def test_one_variant_searches_or_reuses_as_an_input_says():
    _, gm = capture_tiny(wan)
    variant, _ = rewrite(gm, router="headwise")
    assert variant.plan.served_by == {Mode.REUSE: Mode.SEARCH}
    new = variant.graph.gm
    assert count_calls(new, OPS.headwise_search_or_reuse_v1.default) == 2
    for op in (OPS.headwise_plan_v2, OPS.pack_plan_v1, OPS.unpack_plan_v1):
        assert count_calls(new, op.default) == 0
    (flag,) = (given for given in variant.graph.inputs if not hasattr(given, "ref"))
    assert flag.mode is Mode.SEARCH
    example = flag.node.meta["example_value"]
    assert example.shape == () and example.dtype == torch.bool and example.device.type == "cpu"
    reads, writes = list_slots(variant)
    plan = ["headwise.words", "headwise.order"]
    assert reads == [*plan, "attention.plan_density"] * 2
    assert writes == [*plan, *STATISTICS] * 2
    # a plan that lives on is not written anew, and was not searched; its density counts
    always = [write.ref.slot.name for write in variant.graph.writes if not write.modes]
    assert always == ["attention.density"] * 2
    assert {write.modes for write in variant.graph.writes} == {
        frozenset(),
        frozenset({Mode.SEARCH}),
    }
    # what stands for a plan before there is one has a number
    assert all(given.ref.slot.blank == 0 for given in variant.graph.inputs if given is not flag)


@pytest.mark.parametrize("options", [{"verify_every": 2}, {"router": "adaspa"}], ids=str)
def test_others_have_a_variant_for_each_mode(options):
    _, gm = capture_tiny(wan)
    variant, _ = rewrite(gm, **{"router": "headwise", **options})
    assert variant.plan.served_by == {}


def test_modes_are_those_that_the_options_need():
    _, gm = capture_tiny(wan)
    for options, modes in (
        ({"router": "dense"}, "dense"),
        ({"density": 1}, "dense search"),
        ({"refresh_every": 1}, "dense search"),
        ({}, "dense search reuse"),
        ({"verify_every": 2}, "dense search reuse verify"),
    ):
        _, lowering = run_passes(gm, [SparseAttention()], **options)
        assert {mode.value for mode in lowering.program.plan.modes} == set(modes.split())


def test_checked_lists_are_what_attention_takes():
    _, gm = capture_tiny(wan)
    guard = ["guard.boost", "guard.plan_mass", "guard.mass", "guard.error", "guard.caught"]
    plan = ["rainfusion.choice", "attention.recall", "attention.plan_density"]
    options = {"router": "rainfusion", "verify_every": 2}
    for mode, reads, writes in (
        (Mode.SEARCH, ["guard.boost"], [*plan, *guard]),
        (
            Mode.VERIFY,
            ["rainfusion.choice", "attention.plan_density", "guard.plan_mass", "guard.boost"],
            ["guard.boost", *guard[2:]],
        ),
        (Mode.REUSE, ["rainfusion.choice", "attention.plan_density"], []),
    ):
        variant, _ = rewrite(gm, mode, **options)
        alarm = [] if mode is Mode.REUSE else ["guard.alarm"]
        found = [sorted(names) for names in list_slots(variant)]
        wanted = [*writes, "attention.density"] * 2 + alarm
        assert found == [sorted(reads * 2), sorted(wanted)]
        attends = variant.graph.gm.graph.find_nodes(
            op="call_function", target=OPS.block_sparse_attention_v3.default
        )
        lists = {node.args[3].args[0].target for node in attends}
        checked = OPS.guard_plan_v1.default
        assert lists == {OPS.rainfusion_plan_v1.default if mode is Mode.REUSE else checked}


def test_a_dense_call_stays_beside_to_be_compared_with():
    _, gm = capture_tiny(wan)
    for mode in (Mode.SEARCH, Mode.REUSE):
        variant, _ = rewrite(gm, mode, router="rainfusion", verify=True)
        assert sdpa(variant.graph.gm) == 4
        assert count_calls(variant.graph.gm, OPS.compare_heads_v1.default) == 2
        assert list_slots(variant)[1].count("attention.difference") == 2


class Bare(torch.nn.Module):
    """Attention that no parameter feeds."""

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)[:, None]
        out = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return out[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


def test_plans_of_layers_that_cannot_be_told_apart_live_for_one_call():
    gm = capture_one(Bare(), torch.randn(1, 16, 3, 4, 5))
    _, lowering = run_passes(gm, [SparseAttention()])
    assert lowering.program.plan.modes == {Mode.DENSE, Mode.SEARCH}
    assert lowering.program.plan.schedule.refresh_every == 1
    with pytest.raises(OptionError, match=r"refresh_every=3 .* no parameter feeds"):
        run_passes(gm, [SparseAttention()], refresh_every=3)


def test_keeping_everything_moves_no_tokens():
    _, gm = capture_tiny(wan)
    variant, _ = rewrite(gm, density=1)
    assert count_calls(variant.graph.gm, OPS.keep_all_v1.default) == 2
    assert count_calls(variant.graph.gm, OPS.gather_tokens_v1.default) == 0
    assert count_state(variant, gm) == (0, 0)


def test_the_original_graph_is_left_alone():
    _, gm = capture_tiny(wan)
    before = str(gm.graph)
    rewrite(gm)
    assert str(gm.graph) == before


def test_a_key_padding_mask_becomes_a_bias_in_each_heads_order():
    _, gm = capture_tiny(hunyuan_video)
    variant, changed = rewrite(gm)
    assert changed == 2
    assert count_calls(variant.graph.gm, OPS.gather_bias_v1.default) == 2
    for node in variant.graph.gm.graph.find_nodes(
        op="call_function", target=OPS.block_sparse_attention_v3.default
    ):
        assert node.args[5] is not None


@pytest.mark.parametrize("make", [wan, hunyuan_video])
@pytest.mark.parametrize("router", ["headwise", "rainfusion", "subblock"])
def test_the_rewritten_graph_that_keeps_everything_computes_dense_attention(
    make, router, unswitched
):
    """Of six blocks of queries and twelve or more of keys; the orders of tokens must cancel."""
    tiny = make(batch=2, grid=(3, 14, 18))

    def backend(gm, inputs):
        variant, changed = rewrite(gm, router=router, quality=0.999999)
        assert changed == 2 and variant.graph.inputs == []
        return lambda *args: variant.graph.gm(*args)[: variant.graph.outputs]

    torch.compiler.reset()
    out = tiny(torch.compile(tiny.model, backend=backend))
    torch.compiler.reset()
    torch.testing.assert_close(out, tiny(), rtol=1e-5, atol=1e-5)


def test_masked_queries_attend_to_nothing():
    def attend(x, valid):
        mask = valid[:, None, None, :] & valid[:, None, :, None]
        return F.scaled_dot_product_attention(x, 2 * x, -x, attn_mask=mask)

    torch.manual_seed(0)
    x = torch.randn(2, 2, 24, 16)
    valid = torch.arange(24).expand(2, 24) < torch.tensor([[20], [24]])
    gm = capture_one(attend, x, valid)
    variant, changed = rewrite(gm, density=1)
    new = variant.graph.gm
    assert changed == 1 and sdpa(new) == 0
    order = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    out = new(*({"l_x_": x, "l_valid_": valid}[name] for name in order))[0]
    torch.testing.assert_close(out, attend(x, valid), rtol=1e-5, atol=1e-5)
    assert not out[0, :, 20:].any()


def test_attention_without_a_heads_dimension_is_served():
    def attend(x):
        return F.scaled_dot_product_attention(x, 2 * x, -x, scale=0.3)

    torch.manual_seed(0)
    x = torch.randn(4, 24, 16)
    gm = capture_one(attend, x)
    variant, changed = rewrite(gm, density=1)
    assert changed == 1
    torch.testing.assert_close(variant.graph.gm(x)[0], attend(x), rtol=1e-5, atol=1e-5)


class Cast(torch.nn.Module):
    """Attention under autocast over queries and keys, and values, of given dtypes."""

    def __init__(self, qk, v, flat=False):
        super().__init__()
        self.qk, self.v, self.flat = qk, v, flat

    def forward(self, x):
        x = x.flatten(0, 1) if self.flat else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q, v = x.to(self.qk), x.to(self.v)
            return F.scaled_dot_product_attention(q, q, v)


@pytest.mark.parametrize("qk", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_under_autocast_tensors_get_the_dtype_that_the_call_has(qk, v, flat):
    model, x = Cast(qk, v, flat), torch.randn(2, 2, 192, 16)
    variant, changed = rewrite(capture_one(model, x), density=1)
    assert changed == 1
    (out,), wanted = variant.graph.gm(x), model(x)
    assert out.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.02)


def test_without_autocast_nothing_is_converted():
    _, gm = capture_tiny(wan)
    before = len(gm.graph.find_nodes(op="call_method", target="to"))
    variant, _ = rewrite(gm, density=1)
    assert len(variant.graph.gm.graph.find_nodes(op="call_method", target="to")) == before
