from __future__ import annotations

import logging

import pytest
import torch

from dit_opt.decisions import AttentionReason
from dit_opt.inspect.summary import NothingReplaced, log_summary, warn_of_sizes
from dit_opt.options import Options
from dit_opt.runtime.handover import CallTime, tag_outputs
from tests.test_decisions import make_decision, make_record

REPLACED = make_record(make_decision())
LEFT = make_record(make_decision(reason=AttentionReason.TOO_SHORT))
UNKNOWN = make_record(make_decision(reason=AttentionReason.UNKNOWN_TOKENS))


@pytest.fixture
def logged(caplog):
    """What is logged for a record, as (level, text)."""

    def log(record, forwards_latents=False, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="dit_opt"):
            log_summary(record, Options(**options), forwards_latents)
        return [(r.levelname, r.getMessage()) for r in caplog.records]

    return log


def test_one_line_for_each_graph_with_attention(logged):
    assert logged(REPLACED) == [("INFO", "ditopt: 1 of 1 attention sites replaced")]
    assert logged(make_record()) == []


def test_a_graph_where_nothing_matched_warns_or_raises_or_is_ignored(logged):
    (_, line), (level, text) = logged(LEFT)
    assert "0 of 1" in line and level == "WARNING"
    assert "replaced no attention site" in text and "TOO_SHORT" in text
    with pytest.raises(NothingReplaced, match="TOO_SHORT"):
        logged(LEFT, on_no_match="error")
    assert [level for level, _ in logged(LEFT, on_no_match="ignore")] == ["INFO"]


def test_nobody_is_warned_of_what_was_asked_for_or_comes_later(logged):
    assert [level for level, _ in logged(LEFT, router="dense")] == ["INFO"]
    error = {"on_no_match": "error"}
    assert [level for level, _ in logged(LEFT, forwards_latents=True, **error)] == ["INFO"]


@pytest.mark.parametrize(
    ("record", "is_tagged", "warns"),
    [(UNKNOWN, True, True), (UNKNOWN, False, False), (LEFT, True, False)],
)
def test_changing_sizes_are_said_to_be_in_the_way_of_an_earlier_graph(
    caplog, record, is_tagged, warns
):
    tensor = torch.zeros(2)
    if is_tagged:
        tag_outputs([tensor], {}, CallTime(lambda: None))
    warn_of_sizes(record, [3, tensor])
    assert ("dynamic=False" in caplog.text) is warns
