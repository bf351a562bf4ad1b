"""What every graph must satisfy before and after each pass."""

from __future__ import annotations

import re

from torch.fx import Node

from dit_opt._compat import operator_name
from dit_opt.program.program import SlotGraph

_VERSIONED = re.compile(r".+_v\d+$")


class SpecError(RuntimeError):
    """A pass left a graph that is not well formed: a fault of the pass, not of the model."""


def list_unvalued(graph: SlotGraph) -> frozenset[str]:
    """The names of the nodes without a value; Dynamo gives none to what is done for its effect."""
    return frozenset(n.name for n in graph.gm.graph.nodes if not _has_value(n))


def check_graph(graph: SlotGraph, by: str, unvalued: frozenset[str] = frozenset()) -> None:
    """Lint a graph and check that it can be read by the next pass and by the runtime.

    Args:
        graph: the graph. by: the pass that edited it.
        unvalued: names of nodes that had no value when Dynamo made the graph.

    Raises SpecError where a new node has no `meta["example_value"]`, where an op of ditopt has no
    version in its name (caches know an op by its name alone), and where placeholders or outputs
    are not those of the slots.
    """
    nodes = graph.gm.graph
    nodes.lint()
    for node in nodes.nodes:
        if not _has_value(node) and node.name not in unvalued:
            raise SpecError(f"Pass {by!r} wrote {node.format_node()} without an example_value.")
        name = operator_name(node.target) or ""
        if name.startswith("ditopt.") and not _VERSIONED.match(name):
            raise SpecError(f"Pass {by!r} wrote the op {name}, which has no version in its name.")
    (output,) = nodes.find_nodes(op="output")
    handed_out = tuple(output.args[0])[graph.outputs :]
    if handed_out != tuple(write.node for write in graph.writes):
        raise SpecError(
            f"Pass {by!r} left {len(handed_out)} outputs behind the graph's own {graph.outputs}, "
            f"but {len(graph.writes)} slots are written; append them with SlotGraph.write."
        )
    taken = nodes.find_nodes(op="placeholder")[-len(graph.inputs) :] if graph.inputs else []
    if taken != [given.node for given in graph.inputs]:
        raise SpecError(
            f"Pass {by!r} left placeholders that no slot feeds; append them with SlotGraph.read."
        )


def _has_value(node: Node) -> bool:
    return not node.op.startswith("call") or "example_value" in node.meta
