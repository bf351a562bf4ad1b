"""Queries and keys by one kernel: the same output, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dit_opt.passes.qk_prologue import describe_prologues, fold_orders, fuse_prologues

import dit_opt
from dit_opt import analysis
from dit_opt.backend import ditopt
from dit_opt.facts.sites import find_sites
from dit_opt.options import OptionError
from dit_opt.program.edit import copy_graph
from tests.graphs import capture_one, capture_tiny
from zoo import small

OPS = torch.ops.ditopt


def count(gm, target):
    return len(gm.graph.find_nodes(op="call_function", target=target))


@dataclass
class Comparing:
    """A backend that runs each graph as it is and with its prologues fused."""

    fused: list[torch.fx.GraphModule] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, _: list[Any]):
        plain, fused = copy_graph(gm), copy_graph(gm)
        fuse_prologues(fused, find_sites(fused.graph))
        self.fused.append(fused)

        def run(*args):
            wanted, found = plain(*args), fused(*args)
            for one, other in zip(wanted, found, strict=True):
                self.errors.append(float((one - other).norm() / one.norm()))
            return found

        return run


# model: calls of the kernel, each stream of a joint site and Wan's cross-attention counted; and
# under dynamic=True, where the norms of Wan and SD3 have an epsilon that is an input of the graph
CALLS = {"wan": (8, 4), "hunyuan_video": (6, 6), "flux": (2, 2), "sd3": (10, 0)}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CALLS)
def test_models_give_the_same_output(name, dynamic, fresh_dynamo):
    tiny, backend = getattr(small, name)(), Comparing()
    expected = tiny()
    found = tiny(torch.compile(tiny.model, backend=backend, dynamic=dynamic))
    assert count(backend.fused[0], OPS.norm_rope_v1.default) == CALLS[name][bool(dynamic)]
    assert max(backend.errors) < 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_table_would_show(fresh_dynamo):
    tiny, backend = small.wan(), Comparing()
    model = torch.compile(tiny.model, backend=backend)
    tiny(model)
    for node in backend.fused[0].graph.find_nodes(
        op="call_function", target=OPS.norm_rope_v1.default
    ):
        args = list(node.args)
        args[4], args[5] = args[5], args[4]
        node.args = tuple(args)
    backend.fused[0].recompile()
    tiny(model)
    assert backend.errors[-1] > 1e-3


def test_nothing_of_the_old_nodes_is_left():
    _, gm = capture_tiny(small.flux)
    fused = copy_graph(gm)
    fuse_prologues(fused, [find_sites(fused.graph)[1]])
    before, after = (
        sum(n.name.startswith(("stack", "x_rotated")) for n in graph.graph.nodes)
        for graph in (gm, fused)
    )
    assert (before, after) == (8, 4)


def test_what_others_read_stays():
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            q = F.rms_norm(x.unflatten(2, (2, 16)), (16,), weight, 1e-6).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q), q * 2

    x, weight = torch.randn(2, 10, 32), torch.randn(16)
    gm = capture_one(Model(), x, weight)
    fused = copy_graph(gm)
    fuse_prologues(fused, find_sites(fused.graph))
    assert count(fused, OPS.norm_rope_v1.default) == 1
    assert any("rms_norm" in node.name or node.target is F.rms_norm for node in fused.graph.nodes)
    for one, other in zip(gm(x, weight), fused(x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_reports_say_what_stops_the_others():
    _, gm = capture_tiny(small.hunyuan_video)
    text = describe_prologues(find_sites(gm.graph))
    assert text.startswith("4 of 6 queries and keys")
    assert "neither normalised by its RMS nor rotated" in text and "refiner_blocks.0.attn" in text


@pytest.mark.parametrize("searched", [False, True])
def test_orders_are_written_by_the_kernel(searched):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            q, k = (
                F.rms_norm(t.unflatten(2, (2, 16)), (16,), None, 1e-6).transpose(1, 2)
                for t in (x, y)
            )
            return F.scaled_dot_product_attention(q, k, k)

    x, y = torch.randn(2, 10, 32), torch.randn(2, 10, 32)
    gm = capture_one(Model(), x, y)
    (site,) = find_sites(gm.graph)
    written = fuse_prologues(gm, [site])
    rows = torch.rand(2, 2, 10).argsort(-1)
    gm.register_buffer("rows", rows)
    (site,) = find_sites(gm.graph)
    with gm.graph.inserting_before(site.node):
        table = gm.graph.get_attr("rows")
        moved = [
            gm.graph.call_function(OPS.gather_tokens_v1.default, (n, table))
            for n in (site.query, site.key)
        ]
        if searched:
            # as a search for a plan does
            moved[0] = gm.graph.call_function(torch.add, (moved[0], site.query))
    site.node.args = (*moved, site.value)
    gm.recompile()
    expected = gm(x, y)
    assert fold_orders(gm, written) == (0 if searched else 1)
    gathers = count(gm, OPS.gather_tokens_v1.default)
    # the key is the value too, in its own order
    assert gathers == (2 if searched else 1)
    for one, other in zip(expected, gm(x, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_key_of_fewer_heads_keeps_its_gather():
    class Model(torch.nn.Module):
        def forward(self, x, y):
            q, k = (
                F.rms_norm(t.unflatten(2, (-1, 16)), (16,), None, 1e-6).transpose(1, 2)
                for t in (x, y)
            )
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    gm = capture_one(Model(), torch.randn(2, 10, 64), torch.randn(2, 10, 32))
    assert len(fuse_prologues(gm, find_sites(gm.graph))) == 1
    assert count(gm, OPS.norm_rope_v1.default) == 2


def test_what_is_written_before_its_factors_are_made():
    def attend(x, cos, sin, y):
        out = torch.empty_like(x)
        c, s = cos[..., 0::2], sin[..., 1::2]
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        out[..., 0::2] = a * c - b * s
        out[..., 1::2] = a * s + b * c
        return F.scaled_dot_product_attention(out, y, y)

    x, cos, sin, y = (torch.randn(2, 3, 10, 16) for _ in range(4))
    inputs = (x, cos[:1, :1], sin[:1, :1], y)
    gm = capture_one(attend, *inputs)
    (expected,) = gm(*inputs)
    assert len(fuse_prologues(gm, find_sites(gm.graph))) == 1
    assert count(gm, OPS.norm_rope_v1.default) == 1
    torch.testing.assert_close(gm(*inputs)[0], expected)


def test_sites_without_heads_of_their_own_are_left_alone():
    def attend(x, y):
        return F.scaled_dot_product_attention(F.rms_norm(x, (16,), None, 1e-6), y, y)

    x, y = torch.randn(6, 10, 16), torch.randn(6, 12, 16)
    gm = capture_one(attend, x, y, dynamic=True)
    assert fuse_prologues(gm, find_sites(gm.graph)) == []
    assert count(gm, OPS.norm_rope_v1.default) == 0


def test_processors_refuse_it():
    tiny = small.wan()
    with pytest.raises(OptionError, match="where Inductor does it"):
        dit_opt.explain(tiny.model, options={"fuse": True, "min_tokens": 0}, **tiny.inputs)


@pytest.mark.parametrize("router", ["headwise", "rainfusion", "subblock"])
def test_sparse_steps_are_the_same_with_it(router, eager, monkeypatch):
    """The device is looked at once; everything else runs here too."""
    monkeypatch.setattr(analysis, "refuse_processors", lambda sites: None)
    outputs = []
    for fuse in (False, True):
        tiny = small.wan(grid=(3, 16, 16))
        options = {"router": router, "min_tokens": 0, "dense_steps": 0, "fuse": fuse}
        model = torch.compile(tiny.model, backend=ditopt, options=options)
        outputs.append([tiny(model) for _ in range(2)])
        (graph,) = dit_opt.report(tiny.model).graphs
        assert ("4 of 4 queries and keys" in graph.record.prologue) is fuse
        torch.compiler.reset()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
