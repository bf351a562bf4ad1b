"""Edits of a whole graph that keep what Dynamo, AOTAutograd and Inductor expect of it.

Dynamo reads the placeholders of its own graph after the backend has returned, so passes work on
copies.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from dit_opt._compat import mark_static_input

# Set by Dynamo on the module, read by AOTAutograd (its assumption on Dynamo metadata).
_MODULE_ATTRIBUTES = (
    "_param_name_to_source",
    "_source_to_user_stacks",
    "_backend_id",
    "compile_subgraph_reason",
    "torchdynamo_force_dynamic",
    "shape_env",
)
# Set on placeholders, outside of their meta.
_NODE_ATTRIBUTES = ("_dynamo_source",)


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy that passes may edit and Inductor may take over; see `copy_with_nodes`."""
    return copy_with_nodes(gm)[0]


def copy_with_nodes(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy, and the node of the copy for each node of the original.

    Nodes, their order, names and meta are copied; submodules and attributes are shared. Sources of
    placeholders and the module's meta come along.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    (output,) = gm.graph.find_nodes(op="output")
    copies[output] = graph.output(result)
    copies[output].meta = copy.copy(output.meta)
    for original, node in copies.items():
        _copy_attributes(original, node, _NODE_ATTRIBUTES)
    copied = GraphModule(gm, graph, class_name=type(gm).__name__)
    copied.meta = copy.copy(gm.meta)
    _copy_attributes(gm, copied, _MODULE_ATTRIBUTES)
    return copied, copies


def append_placeholder(gm: GraphModule, name: str, example: Any) -> Node:
    """Add a last input to the graph, marked static as a weight is.

    Args:
        name: a hint; the node's own name is unique.
        example: fake tensor, made under the fake mode of the graph's other inputs (for instance by
            `fake.new_empty`), so that its sizes may be symbolic.

    The graph's insertion point stays where it is.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if placeholders:
        place = gm.graph.inserting_after(placeholders[-1])
    else:
        place = gm.graph.inserting_before(next(iter(gm.graph.nodes)))
    with place:
        node = gm.graph.placeholder(name)
    node.meta["example_value"] = example
    mark_static_input(node)
    return node


def append_outputs(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Return `nodes` after what the graph returns; Dynamo's graphs always return a tuple."""
    (output,) = gm.graph.find_nodes(op="output")
    (values,) = output.args
    assert isinstance(values, (tuple, list))
    output.args = ((*values, *nodes),)
    # Describes the old outputs only.
    output.meta.pop("example_value", None)


def erase_unused(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase those of `nodes` that nobody uses any more, the last one first.

    `Graph.eliminate_dead_code` is not safe on Dynamo's graphs: it takes in-place methods such as
    `mul_`, whose results nobody uses, for dead.
    """
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            graph.erase_node(node)


def _copy_attributes(source: Any, target: Any, names: Sequence[str]) -> None:
    for name in names:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
