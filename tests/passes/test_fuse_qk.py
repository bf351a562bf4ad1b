"""Queries and keys by one kernel: the same output, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dit_opt
from dit_opt.backend import ditopt
from dit_opt.options import OptionError, Options
from dit_opt.passes import fuse_qk
from dit_opt.passes.fuse_qk import FuseQK
from dit_opt.program.edit import copy_graph
from dit_opt.program.program import Program
from dit_opt.program.spec import check_graph, list_unvalued
from tests.graphs import capture_one, capture_tiny
from tests.programs import count_calls
from zoo import small

NORM_ROPE = torch.ops.ditopt.norm_rope_v1.default


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The device is looked at once; everything else runs here too."""
    monkeypatch.setattr(fuse_qk, "_refuse_cpu", lambda sparse: None)


@pytest.fixture
def every_site(monkeypatch, as_on_a_gpu):
    """Sites that stay dense are read as well, cross-attention among them."""

    def find_sparse_sites(facts, options):
        return tuple(
            SimpleNamespace(site=site, qkv=(site.query, site.key, site.value))
            for site in facts.sites
        )

    monkeypatch.setattr(fuse_qk, "find_sparse_sites", find_sparse_sites)


def fuse(gm):
    """A copy with its queries and keys fused, and how many these are; what is said of the rest."""
    program, each = Program(gm), FuseQK()
    unvalued = list_unvalued(program.main)
    found = each.find(program.facts, Options(fuse=True))
    matches = [match for match in found if match.decision.accepted]
    each.rewrite(program, matches, Options(fuse=True))
    check_graph(program.main, each.name, unvalued)
    program.main.gm.recompile()
    return program.main.gm, len(matches), each.summarise(found)


@dataclass
class Comparing:
    """A backend that runs each graph as it is and with its prologues fused."""

    fused: list[torch.fx.GraphModule] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, _: list[Any]):
        plain, (fused, _, _) = copy_graph(gm), fuse(gm)
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


@pytest.mark.usefixtures("fresh_dynamo", "every_site")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CALLS)
def test_models_give_the_same_output(name, dynamic):
    tiny, backend = getattr(small, name)(), Comparing()
    expected = tiny()
    found = tiny(torch.compile(tiny.model, backend=backend, dynamic=dynamic))
    assert count_calls(backend.fused[0], NORM_ROPE) == CALLS[name][bool(dynamic)]
    assert max(backend.errors) < 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo", "every_site")
def test_a_wrong_table_would_show():
    tiny, backend = small.wan(), Comparing()
    model = torch.compile(tiny.model, backend=backend)
    tiny(model)
    for node in backend.fused[0].graph.find_nodes(op="call_function", target=NORM_ROPE):
        args = list(node.args)
        args[4], args[5] = args[5], args[4]
        node.args = tuple(args)
    backend.fused[0].recompile()
    tiny(model)
    assert backend.errors[-1] > 1e-3


def test_nothing_of_the_old_nodes_is_left(monkeypatch, every_site):
    _, gm = capture_tiny(small.flux)
    every = fuse_qk.find_sparse_sites
    monkeypatch.setattr(fuse_qk, "find_sparse_sites", lambda *about: every(*about)[1:2])
    fused, _, _ = fuse(gm)
    before, after = (
        sum(n.name.startswith(("stack", "x_rotated")) for n in graph.graph.nodes)
        for graph in (gm, fused)
    )
    assert (before, after) == (8, 4)


def test_what_others_read_stays(every_site):
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            q = F.rms_norm(x.unflatten(2, (2, 16)), (16,), weight, 1e-6).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q), q * 2

    x, weight = torch.randn(2, 10, 32), torch.randn(16)
    gm = capture_one(Model(), x, weight)
    fused, _, _ = fuse(gm)
    assert count_calls(fused, NORM_ROPE) == 1
    assert any("rms_norm" in node.name or node.target is F.rms_norm for node in fused.graph.nodes)
    for one, other in zip(gm(x, weight), fused(x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_reports_say_what_stops_the_others(every_site):
    _, gm = capture_tiny(small.hunyuan_video)
    _, _, text = fuse(gm)
    assert text.startswith("4 of 6 queries and keys")
    assert "neither normalised by its RMS nor rotated" in text and "refiner_blocks.0.attn" in text


def test_what_is_written_before_its_factors_are_made(every_site):
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
    fused, changed, _ = fuse(gm)
    assert changed == count_calls(fused, NORM_ROPE) == 1
    torch.testing.assert_close(fused(*inputs)[0], gm(*inputs)[0])


def test_sites_without_heads_of_their_own_are_left_alone(every_site):
    def attend(x, y):
        return F.scaled_dot_product_attention(F.rms_norm(x, (16,), None, 1e-6), y, y)

    x, y = torch.randn(6, 10, 16), torch.randn(6, 12, 16)
    gm = capture_one(attend, x, y, dynamic=True)
    fused, changed, _ = fuse(gm)
    assert changed == count_calls(fused, NORM_ROPE) == 0


def test_cross_attention_and_dense_sites_keep_what_inductor_makes(as_on_a_gpu):
    _, gm = capture_tiny(small.wan)
    for options, count in (({}, 4), ({"router": "dense"}, 0)):
        facts = Program(gm).facts
        found = FuseQK().find(facts, Options(fuse=True, min_tokens=0, **options))
        assert [match.decision.accepted for match in found] == [True] * count
        assert all("attn1" in match.decision.module for match in found)


def test_processors_refuse_it():
    tiny = small.wan()
    with pytest.raises(OptionError, match="where Inductor does it"):
        dit_opt.explain(tiny.model, options={"fuse": True, "min_tokens": 0}, **tiny.inputs)


@pytest.mark.usefixtures("eager", "as_on_a_gpu")
@pytest.mark.parametrize("router", ["headwise", "rainfusion", "subblock"])
def test_sparse_steps_are_the_same_with_it(router):
    outputs = []
    for is_fused in (False, True):
        tiny = small.wan(grid=(3, 16, 16))
        options = {"router": router, "min_tokens": 0, "dense_steps": 0, "fuse": is_fused}
        model = torch.compile(tiny.model, backend=ditopt, options=options)
        outputs.append([tiny(model) for _ in range(2)])
        (graph,) = dit_opt.report(tiny.model).graphs
        summaries = {record.name: record.summary for record in graph.record.passes}
        assert ("4 of 4 queries and keys" in summaries.get("fuse_qk", "")) is is_fused
        torch.compiler.reset()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
