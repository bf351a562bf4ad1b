from __future__ import annotations

import json

import pytest
import sympy

from dit_opt.decisions import (
    ACCEPTED,
    AttentionReason,
    Decision,
    GraphRecord,
    LayoutSummary,
    PassRecord,
    Reason,
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


def make_record(*decisions, timestep=None, **fields) -> GraphRecord:
    """A graph whose sites were decided by one pass."""
    changed = sum(d.accepted for d in decisions)
    record = PassRecord("sparse_attention", changed, 0.5, decisions, **fields)
    return GraphRecord((record,), timestep)


@pytest.mark.parametrize(
    "reason", [*AttentionReason, *RewriteReason], ids=lambda reason: reason.name
)
def test_every_reason_is_a_sentence(reason):
    assert reason.message.endswith(".")
    assert reason.remedy == "" or reason.remedy.endswith(".")
    assert str(reason).startswith(reason.message) and isinstance(reason, Reason)


def test_each_family_has_one_reason_that_accepts():
    for family in (AttentionReason, RewriteReason):
        assert len(set(family.__members__) & set(ACCEPTED)) == 1
    assert Decision("m", "f.py:1", RewriteReason.REWRITTEN).accepted
    assert not Decision("m", "f.py:1", RewriteReason.NOT_PROVED).accepted


def test_replaced():
    assert make_decision().replaced and make_decision().accepted
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


def test_a_decision_of_any_pass_is_json():
    decision = Decision("blocks.0", "f.py:1", RewriteReason.NOT_PROVED, "It is too odd.")
    assert json.loads(json.dumps(decision.to_json())) == {
        "module": "blocks.0",
        "source": "f.py:1",
        "accepted": False,
        "reason": "NOT_PROVED",
        "message": str(RewriteReason.NOT_PROVED),
        "detail": "It is too odd.",
    }


def test_graph_record():
    left = make_decision(site=4, reason=AttentionReason.CROSS_ATTENTION)
    moved = Decision("blocks.0", "f.py:1", RewriteReason.REWRITTEN)
    order = PassRecord("token_order", 1, 0.25, (moved,), "Ordered once.")
    record = GraphRecord(
        (order, PassRecord("sparse_attention", 1, 0.5, (make_decision(), left))), "timestep"
    )
    assert [d.site for d in record.decisions] == [3, 4]
    assert [d.site for d in record.replaced] == [3]
    out = json.loads(json.dumps(record.to_json()))
    assert out["timestep"] == "timestep"
    first, second = out["passes"]
    assert first == {
        "name": "token_order",
        "changed": 1,
        "seconds": 0.25,
        "summary": "Ordered once.",
        "decisions": [moved.to_json()],
    }
    # decisions about sites are the graph's, and not said twice
    assert (second["name"], second["decisions"]) == ("sparse_attention", [])
    assert [d["reason"] for d in out["decisions"]] == ["REPLACED", "CROSS_ATTENTION"]


def test_decisions_hash():
    assert len({make_decision(), make_decision(), make_decision(site=4)}) == 2
