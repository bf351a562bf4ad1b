from __future__ import annotations

from dataclasses import replace

import sympy

from dit_opt.decisions import AttentionReason, GraphRecord
from dit_opt.inspect.differences import suggest_dense
from dit_opt.inspect.records import GraphReport, GuardReport, LayerReport
from dit_opt.inspect.text import (
    render_decisions,
    render_records,
    render_report,
    summarise,
)
from tests.test_decisions import make_decision, make_record

CROSS = make_decision(
    site=4,
    module="blocks.0.attn2",
    reason=AttentionReason.CROSS_ATTENTION,
    router="",
    gain=None,
    layout=None,
)


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if "blocks" in line]


def test_table():
    text = render_decisions([make_decision(), CROSS], "one graph")
    assert text.startswith("one graph\n")
    first, second = rows(text)
    for part in (
        "blocks.0.attn1",
        "REPLACED by rainfusion",
        "self latents[0:s0]",
        "s0/20 x 4 x 5 (latents)",
        "[1, 2, s0, 24]",
        "2.50x",
        "transformer_wan.py:143",
        "1e-06",
    ):
        assert part in first
    assert "CROSS_ATTENTION" in second
    assert f"CROSS_ATTENTION: {AttentionReason.CROSS_ATTENTION.message}" in text
    # a replaced site needs no explanation
    assert AttentionReason.REPLACED.message not in text


def test_layers_share_a_row():
    layers = [make_decision(site=i, module=f"blocks.{i}.attn1") for i in range(40)]
    text = render_decisions([*layers, CROSS])
    assert len(rows(text)) == 2
    assert "blocks.*.attn1 (x40)" in text and "0..39" in text


def test_layers_that_differ_do_not():
    other = make_decision(
        site=1, module="blocks.1.attn1", reason=AttentionReason.TOO_SHORT, detail="60 keys"
    )
    text = render_decisions([make_decision(site=0), other])
    assert len(rows(text)) == 2
    assert "[60 keys]" in text and AttentionReason.TOO_SHORT.remedy in text


def test_flops_are_numbers_where_they_are():
    text = render_decisions(
        [replace(CROSS, flops_dense=sympy.Integer(2 * 10**9), flops_sparse=None)]
    )
    assert " 2 " in rows(text)[0]


def test_no_sites():
    assert render_decisions([], "graph 1") == "graph 1\nNo attention site."
    assert render_decisions([]) == "No attention site."


def test_summary():
    record = make_record(make_decision(), CROSS, replace(CROSS, site=5))
    line = "ditopt: 1 of 3 attention sites replaced (left alone: CROSS_ATTENTION 2)"
    assert summarise(record) == line
    assert summarise(make_record(make_decision())) == "ditopt: 1 of 1 attention sites replaced"


def test_records_of_several_graphs():
    with_sites = make_record(make_decision(), CROSS, timestep="timestep", summary="Moved once.")
    text = render_records([with_sites, GraphRecord(()), with_sites])
    assert text.count("1 of 2 attention sites replaced") == 2
    assert text.count("; Moved once.") == 2
    assert "graph 0 of 3" in text and "graph 2 of 3" in text and "timestep: timestep" in text
    assert text.endswith("1 more graph without attention.")
    assert render_records([GraphRecord(())] * 2) == "No attention site in 2 graphs."


def test_report():
    layer = LayerReport(
        module="blocks.0.attn1",
        layer="blocks.0.attn1.to_q.weight",
        branch=1,
        density=0.25,
        recall=0.96,
        heads={"temporal": 3, "spatial": 9},
        density_by_type={"spatial": 0.2, "temporal": 0.4},
        calls=40,
        searches=10,
        plan_bytes=2_500_000,
        guard=None,
        differences={},
    )
    record = make_record(make_decision(), CROSS)
    graph = GraphReport(record, {"dense": 10, "search": 40}, (layer,), warm=True)
    text = render_report([graph], 0.25)
    assert "warm cache; calls: dense 10, search 40" in text
    assert "timestep: none found" in text
    (row,) = [line for line in text.splitlines() if "to_q.weight" in line]
    for part in ("0.250", "0.960", "spatial 9, temporal 3", "spatial 0.200, temporal 0.400", "40"):
        assert part in row
    assert "take 2.5 MB" in text and text.endswith("Mean density over sparse steps: 0.250")


def make_layer(module, differences):
    return LayerReport(
        module, f"{module}.to_q.weight", 0, 0.25, 0.9, {}, {}, 4, 1, 10, None, differences
    )


def test_what_is_not_a_number_differs_and_is_named():
    nan = float("nan")
    whole = make_layer("blocks.0.attn1", {1: 0.01, 2: 0.01, 3: 0.01})
    broken = make_layer("blocks.1.attn1", {1: 0.01, 2: nan, 3: 0.01})
    assert suggest_dense([whole]).startswith("No step and no layer")
    text = suggest_dense([whole, broken])
    assert "not a number, first at step 2, in blocks.1.attn1." in text
    assert "consider dense_steps=3." in text
    graph = GraphReport(make_record(make_decision()), {}, (whole, broken), warm=None)
    assert text in render_report([graph], 0.25)


def test_report_of_nothing():
    assert "has not run under ditopt" in render_report([], None)
    cold = GraphReport(make_record(CROSS), {}, (), warm=None)
    assert "not compiled yet; calls: none" in render_report([cold], None)


def test_what_the_guard_found_is_in_its_layers_row():
    guard = GuardReport(checks=4, kept=0.875, error=0.0625, caught=3, dense_heads=0)
    layers = [
        replace(make_layer(f"blocks.{i}.attn1", {}), guard=found)
        for i, found in enumerate((guard, replace(guard, dense_heads=2), None))
    ]
    graph = GraphReport(make_record(make_decision()), {}, tuple(layers), warm=None)
    found = [row for row in render_report([graph], 0.25).splitlines() if "to_q.weight" in row]
    assert "kept 0.875, error 0.062, caught 3" in found[0] and "dense" not in found[0]
    assert "caught 3, dense 2" in found[1] and found[2].rstrip().endswith("off")
