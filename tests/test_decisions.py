from __future__ import annotations

import json

import pytest
import sympy

from dit_opt.decisions import (
    AttentionReason,
    Decision,
    GraphRecord,
    LayoutSummary,
    PassRecord,
    RewriteReason,
    SiteDecision,
)

S0 = sympy.Symbol("s0")


def make_decision(**changes) -> SiteDecision:
    fields = {
        "site": 3,
        "module": "blocks.0.attn1",
        "source": "transformer_wan.py:143",
        "reason": AttentionReason.REPLACED,
        "shapes": ("[1, 2, s0, 24]", "[1, 2, s0, 24]"),
        "layout": LayoutSummary(
            "self", ("latents[0:s0]",), (S0 / 20, 4, sympy.Integer(5)), "latents"
        ),
        "router": "rainfusion",
        "flops_dense": 96 * S0**2,
        "flops_sparse": sympy.Integer(1000),
        "gain": 2.5,
    }
    return SiteDecision(**{**fields, **changes})


@pytest.mark.parametrize("reason", AttentionReason)
def test_every_reason_is_a_sentence(reason):
    assert reason.message.endswith(".")
    assert reason.remedy == "" or reason.remedy.endswith(".")
    assert str(reason).startswith(reason.message)


def test_replaced():
    assert make_decision().replaced
    assert not make_decision(reason=AttentionReason.CAUSAL).replaced


def test_json_keeps_everything():
    out = json.loads(json.dumps(make_decision().to_json()))
    assert out["site"] == 3
    assert out["reason"] == "REPLACED" and out["replaced"] is True
    assert out["layout"] == {
        "kind": "self",
        "segments": ["latents[0:s0]"],
        "grid": ["s0/20", 4, 5],
        "grid_source": "latents",
        "reason": "",
    }
    assert out["flops_dense"] == "96*s0**2" and out["flops_sparse"] == 1000
    assert out["gain"] == 2.5


def test_json_without_a_layout():
    out = make_decision(layout=None, flops_dense=None, gain=None).to_json()
    assert out["layout"] is None and out["flops_dense"] is None and out["gain"] is None


def record_of(*decisions: SiteDecision, timestep: str | None = None) -> GraphRecord:
    """The record of a graph with these attention sites."""
    changed = sum(d.accepted for d in decisions)
    return GraphRecord((PassRecord("sparse_attention", changed, 0.5, decisions),), timestep)


def test_graph_record():
    left = make_decision(site=4, reason=AttentionReason.CROSS_ATTENTION)
    order = PassRecord(
        "token_order", 1, 0.25, (Decision("", "", RewriteReason.REWRITTEN),), "Once."
    )
    sparse = PassRecord("sparse_attention", 1, 0.5, (make_decision(), left))
    record = GraphRecord((order, sparse), "timestep")
    assert [d.site for d in record.replaced] == [3]
    out = json.loads(json.dumps(record.to_json()))
    assert out["timestep"] == "timestep"
    assert [(p["name"], p["changed"], p["seconds"]) for p in out["passes"]] == [
        ("token_order", 1, 0.25),
        ("sparse_attention", 1, 0.5),
    ]
    assert out["passes"][0]["summary"] == "Once."
    # those of attention are the graph's, and not said twice
    assert [d["reason"] for d in out["passes"][0]["decisions"]] == ["REWRITTEN"]
    assert out["passes"][1]["decisions"] == []
    assert [d["reason"] for d in out["decisions"]] == ["REPLACED", "CROSS_ATTENTION"]


def test_decisions_hash():
    assert len({make_decision(), make_decision(), make_decision(site=4)}) == 2
