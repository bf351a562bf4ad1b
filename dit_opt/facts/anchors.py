"""Anchors: the parameters whose identity tells layers and models apart at run time.

One compiled block serves every layer of a model; its parameters say which layer runs.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from dit_opt._compat import parameter_path
from dit_opt.facts.nodes import walk_ancestors
from dit_opt.facts.sites import Site


def find_layer_anchor(site: Site, graph: Graph) -> Node | None:
    """The placeholder of a parameter that only this site's layer has, or None.

    It belongs to the module that makes the call; failing that, it is the nearest parameter that the
    query is computed from.
    """
    owner = tuple(site.module.split(".")) if site.module else ()
    if owner:
        for node in graph.find_nodes(op="placeholder"):
            path = parameter_path(node)
            if path is not None and path[: len(owner)] == owner:
                return node
    if site.query is None:
        return None
    return next((n for n in walk_ancestors(site.query) if parameter_path(n) is not None), None)


def find_model_anchor(graph: Graph) -> Node | None:
    """The placeholder of the graph's first parameter, or None where it has no parameters."""
    placeholders = graph.find_nodes(op="placeholder")
    return next((n for n in placeholders if parameter_path(n) is not None), None)
