"""What is said of a graph when it is compiled: one line, or why nothing was replaced."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dit_opt.decisions import GraphRecord, Reason
from dit_opt.inspect.render import render_decisions, summarise
from dit_opt.options import Options
from dit_opt.runtime.handover import told_moment

log = logging.getLogger(__name__)


class NothingReplaced(RuntimeError):
    """`on_no_match="error"` and no attention site of a graph could be replaced."""


def announce(record: GraphRecord, options: Options, forwards_latents: bool) -> None:
    """One line for each graph with attention, warm starts included; more where nothing matched.

    `forwards_latents`: another graph of the model gets the latents, and answers for it.
    """
    if not record.decisions:
        return
    log.info("%s", summarise(record))
    log.debug("%s", render_decisions(record.decisions))
    if forwards_latents or any(d.replaced for d in record.decisions) or options.router == "dense":
        return
    message = (
        "ditopt replaced no attention site of this graph, which runs as under plain Inductor:\n%s"
    )
    if options.on_no_match == "error":
        raise NothingReplaced(message % render_decisions(record.decisions))
    if options.on_no_match == "warn":
        log.warning(message, render_decisions(record.decisions))


def warn_of_sizes(record: GraphRecord, inputs: Sequence[Any]) -> None:
    """Say why a graph of changing sizes does not know the tokens that an earlier one returned."""
    unknown = any(d.reason is Reason.UNKNOWN_TOKENS for d in record.decisions)
    if unknown and told_moment(inputs) is not None:
        log.warning(
            "Dynamo broke this model apart, and a graph of it takes sizes that differ from call to "
            "call, so it cannot be told the grid of its tokens and stays dense. Compile with "
            "dynamic=False to have one graph for each size."
        )
