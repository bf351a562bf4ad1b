"""Gathers that the kernel of queries and keys does itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dit_opt.options import Options
from dit_opt.passes import fold_orders, fuse_qk
from dit_opt.passes.fold_orders import FoldOrders
from dit_opt.passes.fuse_qk import FuseQK
from dit_opt.program.modes import Mode
from dit_opt.program.program import Program
from tests.graphs import capture_one, capture_tiny
from tests.programs import count_calls, run_passes
from zoo import small

OPS = torch.ops.ditopt
GATHER, NORM_ROPE = OPS.gather_tokens_v1.default, OPS.norm_rope_v1.default


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The device is looked at once; everything else runs here too."""
    monkeypatch.setattr(fuse_qk, "_refuse_cpu", lambda sparse: None)


@pytest.fixture
def every_site(monkeypatch):
    """Queries and keys of two inputs are cross-attention, which stays dense."""

    def find_sparse_sites(facts, options):
        return tuple(
            SimpleNamespace(site=site, qkv=(site.query, site.key, site.value))
            for site in facts.sites
        )

    for module in (fuse_qk, fold_orders):
        monkeypatch.setattr(module, "find_sparse_sites", find_sparse_sites)


class Attention(torch.nn.Module):
    """Normalised queries and keys; the key is the value, too, in its own order."""

    def forward(self, x, y):
        q, k = (
            F.rms_norm(t.unflatten(2, (-1, 16)), (16,), None, 1e-6).transpose(1, 2) for t in (x, y)
        )
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def find(gm):
    """A program with its queries and keys fused, and what may be folded."""
    options = Options(fuse=True)
    program, each = Program(gm), FuseQK()
    matches = [m for m in each.find(program.facts, options) if m.decision.accepted]
    each.rewrite(program, matches, options)
    program.facts.drop(each.keeps)
    return program, FoldOrders().find(program.facts, options)


@pytest.mark.parametrize("searched", [False, True])
def test_orders_are_written_by_the_kernel(searched, every_site):
    x, y = torch.randn(2, 10, 32), torch.randn(2, 10, 32)
    program, matches = find(capture_one(Attention(), x, y))
    assert [match.decision.accepted for match in matches] == [True, True]
    gm = program.main.gm
    gm.register_buffer("rows", torch.rand(2, 2, 10).argsort(-1))
    (site,) = program.facts.sites
    with gm.graph.inserting_before(site.node):
        table = gm.graph.get_attr("rows")
        moved = [gm.graph.call_function(GATHER, (n, table)) for n in (site.query, site.key)]
        if searched:
            # as a search for a plan does
            moved[0] = gm.graph.call_function(torch.add, (moved[0], site.query))
    site.node.args = (*moved, site.value)
    gm.recompile()
    expected = gm(x, y)
    variant = program.start_variant(Mode.REUSE)
    FoldOrders().lower(variant, matches, Options())
    variant.graph.gm.recompile()
    # the key is read as the value, too
    assert count_calls(variant.graph.gm, GATHER) == (2 if searched else 1)
    assert count_calls(variant.graph.gm, NORM_ROPE) == 2
    for one, other in zip(expected, variant.graph.gm(x, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_key_of_fewer_heads_keeps_its_gather(every_site):
    gm = capture_one(Attention(), torch.randn(2, 10, 64), torch.randn(2, 10, 32))
    program, matches = find(gm)
    assert count_calls(program.main.gm, NORM_ROPE) == 2
    query, key = (match.decision for match in matches)
    assert query.accepted and not key.accepted and "fewer heads" in key.detail


@pytest.mark.parametrize(
    ("mode", "gathers"),
    # values have an order, too; a search reads queries and keys before theirs is known
    [(Mode.SEARCH, 6), (Mode.REUSE, 2)],
)
def test_a_plan_that_lives_on_saves_the_gathers_of_queries_and_keys(mode, gathers):
    _, gm = capture_tiny(small.wan)
    _, lowering = run_passes(gm, router="rainfusion", fuse=True)
    assert count_calls(lowering.make_variant(mode).graph.gm, GATHER) == gathers


def test_what_no_kernel_writes_is_no_place_to_look_at():
    _, gm = capture_tiny(small.wan)
    options = Options(min_tokens=0)
    assert FoldOrders().find(Program(gm).facts, options) == []
    assert not FoldOrders().wanted(options)
