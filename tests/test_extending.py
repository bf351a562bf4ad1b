"""A pass or a router is one class and one line of a list: both are written here, and work.

The pass hoists what depends on the timestep alone; the router keeps a band of key blocks. No other
file of the product knows either of them.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import sympy
import torch
import torch.nn.functional as F

import dit_opt
from dit_opt import passes, routers
from dit_opt.decisions import Decision, RewriteReason
from dit_opt.facts.nodes import is_user_input
from dit_opt.facts.sites import module_of, source_of
from dit_opt.options import Options
from dit_opt.passes.base import Match, Pass
from dit_opt.policy.site_cost import predict_attention
from dit_opt.program.edit import copy_with_nodes
from dit_opt.program.program import Piece, SlotGraph
from dit_opt.program.slots import Key, Lives, Slot, SlotRef
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Routed, Router
from dit_opt.runtime.registry import live_bounds
from tests.trajectories import big_wan, compiled, relative_error, run_trajectory

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

HOISTED = Slot("hoist.step", frozenset({Key.PARAMETER, Key.STEP}), Lives.WEIGHTS)


class HoistStep(Pass):
    """What depends on the timestep and on weights alone is made once for each step.

    Triggers on the last linear layer of the timestep's embedding. A piece with all that it is
    computed from writes a slot, and the main graph reads the slot. Only right where all runs have
    the same timesteps, since a step is known by its number, and where weights change together.
    """

    name = "hoist_step"
    keeps = frozenset()

    def find(self, facts, options):
        if facts.timestep is None:
            return []
        matches = []
        inputs = [n for n in facts.graph.find_nodes(op="placeholder") if is_user_input(n)]
        others = set(inputs) - set(facts.timestep.candidates)
        for node in facts.graph.find_nodes(op="call_function", target=F.linear):
            needed = list_needed(node)
            if not set(facts.timestep.candidates) & needed:
                continue
            place = (module_of(node), source_of(node))
            if needed & others:
                reason = RewriteReason.NOT_PROVED
                matches.append(Match(Decision(*place, reason, "It depends on another input.")))
            else:
                matches.append(Match(Decision(*place, RewriteReason.REWRITTEN), node, needed))
        last = max((m for m in matches if m.node), key=lambda m: m.node, default=None)
        return [m for m in matches if m.node is None or m is last]

    def rewrite(self, program, matches, options):
        (match,) = matches
        graph = program.main.gm.graph
        placeholders = graph.find_nodes(op="placeholder")
        arguments = tuple(i for i, n in enumerate(placeholders) if n in match.what)
        ref = SlotRef(HOISTED)
        program.pieces.append(Piece("hoist_step", cut(program.main.gm, match, ref), arguments))
        value = program.main.read(ref, match.node.meta["example_value"])
        match.node.replace_all_uses_with(value)
        for node in sorted(match.what | {match.node}, reverse=True):
            if not node.users and node.op != "placeholder":
                graph.erase_node(node)

    def summarise(self, matches):
        return f"{sum(m.decision.accepted for m in matches)} value of each step is hoisted."


def list_needed(node):
    """All that a node is computed from."""
    waiting, needed = [node], set()
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent not in needed:
                needed.add(parent)
                waiting.append(parent)
    return needed


def cut(gm, match, ref):
    """The nodes of a match as a graph of their own, which writes a slot."""
    copied, at = copy_with_nodes(gm)
    (output,) = copied.graph.find_nodes(op="output")
    output.args = ((),)
    kept = {at[node] for node in match.what} | {at[match.node], output}
    for node in reversed(list(copied.graph.nodes)):
        if node not in kept:
            copied.graph.erase_node(node)
    piece = SlotGraph(copied)
    piece.write(ref, at[match.node])
    copied.recompile()
    return piece


@pytest.fixture
def hoisting(monkeypatch):
    monkeypatch.setattr(passes, "PASSES", (HoistStep(), *passes.PASSES))


@pytest.fixture
def pieces(monkeypatch, eager):
    """The calls of the hoisted graph."""
    from dit_opt.runtime import compiler

    calls = []

    def stand_in(gm, inputs, patches):
        (output,) = gm.graph.find_nodes(op="output")
        is_piece = len(output.args[0]) == 1 and len(inputs) < 12

        def run(*args):
            if is_piece:
                calls.append(args)
            return gm(*args)

        return run

    monkeypatch.setattr(compiler, "compile_with_inductor", stand_in)
    return calls


OPTIONS = {"router": "rainfusion", "min_tokens": 0, "dense_steps": 1, "refresh_every": 2}
STEPS = (999.0, 750.0, 500.0, 250.0)


@pytest.mark.parametrize("options", [{"router": "dense"}, OPTIONS], ids=["dense", "sparse"])
def test_a_hoisted_value_is_made_once_for_each_step_and_is_the_same(options, request, pieces):
    tiny = big_wan()
    expected = run_trajectory(compiled(tiny.model, **options), tiny.inputs, STEPS * 2)
    assert pieces == []
    torch.compiler.reset()
    request.getfixturevalue("hoisting")
    found = run_trajectory(compiled(tiny.model, **options), tiny.inputs, STEPS * 2)
    for out, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=0)
    assert len(pieces) == len(STEPS)


def test_weights_that_change_are_hoisted_anew(hoisting, pieces):
    tiny = big_wan(layers=1)
    model = compiled(tiny.model, router="dense")
    run_trajectory(model, tiny.inputs, STEPS[:2])
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.mul_(1.5)
    (found,) = run_trajectory(model, tiny.inputs, STEPS[:1])
    (expected,) = run_trajectory(tiny.model, tiny.inputs, STEPS[:1])
    assert len(pieces) == 3 and relative_error(found, expected) < 1e-5


def test_a_new_pass_is_explained_reported_and_dumped(hoisting, eager, tmp_path):
    tiny = big_wan()
    explained = dit_opt.explain(tiny.model, options=OPTIONS, **tiny.inputs)
    assert "1 value of each step is hoisted" in str(explained)
    model = compiled(tiny.model, dump=str(tmp_path), **OPTIONS)
    run_trajectory(model, tiny.inputs, STEPS[:2])
    report = dit_opt.report(tiny.model)
    (graph,) = json.loads(report.to_json())["graphs"]
    record = graph["passes"][0]
    assert (record["name"], record["changed"]) == ("hoist_step", 1) and record["seconds"] > 0
    assert [d["accepted"] for d in record["decisions"]].count(True) == 1
    # one value for each of two steps
    (bound,) = live_bounds()
    values = [e.value for _, (slot, _), _, e in bound.store if slot is HOISTED]
    assert len(values) == 2
    assert graph["slot_bytes"]["hoist.step"] == sum(value.nbytes for value in values)
    assert "1 value of each step is hoisted" in str(report)
    (diff,) = tmp_path.glob("graph_*/*hoist_step.diff")
    added = [line for line in diff.read_text().splitlines() if line.startswith("+")]
    assert any("slot_hoist_step_0" in line for line in added)


def test_a_new_pass_runs_through_inductor(hoisting):
    tiny = big_wan(layers=1)
    model = compiled(tiny.model, router="dense")
    for found, expected in zip(
        run_trajectory(model, tiny.inputs, STEPS[:2]),
        run_trajectory(tiny.model, tiny.inputs, STEPS[:2]),
        strict=True,
    ):
        assert relative_error(found, expected) < 1e-5


BAND = Slot("band.counts")


class Band(Router):
    """The blocks around the diagonal, in the model's own order; its slot is their number."""

    name = "band"
    density = 0.5
    launches = 3
    slots = (BAND,)

    def count_pairs(self, tokens):
        return sympy.Integer(0)

    def search(self, site):
        counts, indices = write_band(site)
        example = site.q.meta["example_value"]
        share = site.emit.call(torch.full, example.shape[:2], DENSITY, device=example.device)
        return Routed(
            *(site.q, site.k, site.v, site.bias, counts, indices),
            state={BAND: counts},
            recall=share,
            density=share,
        )

    def restore(self, site):
        _, indices = write_band(site)
        counts = site.read(BAND, [BLOCK_Q])
        return Routed(site.q, site.k, site.v, site.bias, counts, indices, state={BAND: counts})


# 768 tokens are 6 x 12 blocks, of which each row keeps its two and one on each side
TOKENS = 768
ROWS, COLUMNS = TOKENS // BLOCK_Q, TOKENS // BLOCK_K
DENSITY = (4 * ROWS - 2) / (ROWS * COLUMNS)


def mark_band():
    """Which blocks are kept, bool `[6, 12]`."""
    apart = torch.arange(COLUMNS) - 2 * torch.arange(ROWS)[:, None]
    return (apart >= -1) & (apart <= 2)


def make_band(heads):
    """Counts `[1, heads, 6]` and indices `[1, heads, 6, 12]` of the kept blocks."""
    kept = mark_band()
    counts, indices = kept.sum(1).int(), (~kept).int().argsort(dim=1, stable=True).int()
    return counts.expand(1, heads, -1), indices.expand(1, heads, -1, -1)


def write_band(site):
    counts, indices = make_band(site.q.meta["example_value"].shape[1])
    emit = site.emit
    return (
        emit.call(torch.tensor, counts.tolist(), dtype=torch.int32),
        emit.call(torch.tensor, indices.tolist(), dtype=torch.int32),
    )


@pytest.fixture
def band(monkeypatch):
    monkeypatch.setattr(routers, "ROUTERS", (*routers.ROUTERS, Band()))
    predict_attention.cache_clear()
    yield
    predict_attention.cache_clear()


@pytest.fixture
def masked_attention(monkeypatch):
    """Self-attention of the eager model over the same blocks, by a dense mask."""
    mask = mark_band().repeat_interleave(BLOCK_Q, 0).repeat_interleave(BLOCK_K, 1)
    attend = F.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **kwargs):
        if query.shape[-2] == key.shape[-2] == TOKENS:
            attn_mask = mask
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    def use(model, inputs, timesteps):
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", masked)
            return run_trajectory(model, inputs, timesteps)

    return use


BANDED = {**OPTIONS, "router": "band"}


def test_a_new_router_is_an_option_and_has_a_cost(band):
    assert Options(router="band").effective_density == 0.5
    options = Options(router="band", density=0.2, refresh_every=1)
    found = predict_attention(8, 64, 4, torch.device("cpu"), options)
    searching = dataclasses.replace(options, router="adaspa")
    other = predict_attention(8, 64, 4, torch.device("cpu"), searching)
    assert found.spend(8192)[1] < other.spend(8192)[1]
    explained = dit_opt.explain(big_wan().model, options=BANDED, **big_wan().inputs)
    replaced = [d for d in explained.decisions if d.replaced]
    assert len(replaced) == 2 and all(d.router == "band" and d.gain for d in replaced)
    assert "REPLACED by band" in str(explained)


def test_a_new_router_attends_to_what_it_keeps(band, eager, masked_attention):
    tiny = big_wan()
    found = run_trajectory(compiled(tiny.model, **BANDED), tiny.inputs, STEPS)
    dense = run_trajectory(tiny.model, tiny.inputs, STEPS)
    banded = masked_attention(tiny.model, tiny.inputs, STEPS)
    assert relative_error(found[0], dense[0]) < 1e-6
    for out, expected, full in zip(found[1:], banded[1:], dense[1:], strict=True):
        assert relative_error(out, expected) < 1e-5 < relative_error(out, full)


def test_a_new_router_is_reported_with_its_slot(band, eager, tmp_path):
    tiny = big_wan()
    run_trajectory(compiled(tiny.model, dump=str(tmp_path), **BANDED), tiny.inputs, STEPS)
    report = dit_opt.report(tiny.model)
    (graph,) = report.graphs
    assert graph.calls == {"dense": 1, "search": 2, "reuse": 1}
    assert graph.slot_bytes["band.counts"] == 2 * 2 * 6 * 4
    for row in graph.layers:
        assert row.density == pytest.approx(DENSITY) and row.heads == {"band": 2}
        assert row.plan_bytes == 2 * 6 * 4
    assert "band 2" in str(report)
    text = next(tmp_path.glob("graph_*/*sparse_attention.reuse.after.py")).read_text()
    assert "slot_band_counts_0" in text


def test_a_new_router_is_guarded_and_compared_like_any_other(band, eager):
    tiny = big_wan()
    asked = {**BANDED, "verify_every": 1, "verify": True}
    run_trajectory(compiled(tiny.model, **asked), tiny.inputs, STEPS)
    for row in dit_opt.report(tiny.model).graphs[0].layers:
        assert row.guard.checks == 3 and 0 < row.guard.kept <= 1
        assert sorted(row.differences) == [1, 2, 3]


def test_a_new_router_runs_through_inductor(band, masked_attention):
    tiny = big_wan(layers=1)
    asked = {**BANDED, "dense_steps": 0}
    found = run_trajectory(compiled(tiny.model, **asked), tiny.inputs, STEPS[:2])
    expected = masked_attention(tiny.model, tiny.inputs, STEPS[:2])
    for out, reference in zip(found, expected, strict=True):
        assert relative_error(out, reference) < 1e-5
