"""In-place writes, and the aliases through which they are seen.

A pass that moves a read to another place of the graph must know that nothing writes to the memory
in between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from dit_opt._compat import writes_in_place
from dit_opt.facts.nodes import holds_tensor
from dit_opt.facts.ops import Trait, has, is_in_place


def find_targets(node: Node) -> list[Node]:
    """The values that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if writes_in_place(node.target):
        return list(node.all_input_nodes)
    targets = [node.kwargs.get("out")]
    if is_in_place(node):
        targets += [node.args[0] if node.args else node.kwargs.get("input")]
    # `out` and what `_foreach_` ops write to may be several.
    lists = [t if isinstance(t, (list, tuple)) else [t] for t in targets]
    return [t for several in lists for t in several if isinstance(t, Node)]


def find_bases(node: Node) -> list[Node]:
    """The inputs that a node's value may alias, by its op or by its fake storage."""
    bases = find_targets(node)
    if has(node, Trait.ALIAS):
        first = node.args[0] if node.args else None
        bases += [first] if isinstance(first, Node) else node.all_input_nodes
    # Views that the trait misses, as `einsum` of one operand, and all views of other libraries.
    held = _find_storages(node)
    for source in node.all_input_nodes if held else ():
        if any(a is b for a in _find_storages(source) for b in held):
            bases.append(source)
    return bases


def find_write(
    nodes: Iterable[Node],
    known: Collection[Node] = (),
    after: Node | None = None,
    before: Node | None = None,
) -> Node | None:
    """A write to the memory of one of the nodes, through any alias, other than the known ones.

    It comes after that node, or after `after` where that is given, and before `before`.
    """
    # The nodes are mostly aliases of each other.
    bases = cache(find_bases)

    def find_views(node: Node) -> list[Node]:
        return [user for user in node.users if node in bases(user)]

    for node in nodes:
        for alias in _reach(_reach([node], bases), find_views):
            for user in alias.users:
                if user <= (after or node) or (before and user >= before) or user in known:
                    continue
                if alias in find_targets(user):
                    return user
    return None


def _reach(nodes: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """All tensors that steps lead to from the nodes, with the nodes."""
    waiting, met = list(nodes), set(nodes)
    while waiting:
        for found in step(waiting.pop()):
            # A size aliases nothing.
            other = "example_value" in found.meta and not holds_tensor(found.meta["example_value"])
            if found not in met and not other:
                met.add(found)
                waiting.append(found)
    return met


def _find_storages(node: Node) -> list[Any]:
    """The storages behind a tensor, or behind those of a tuple; none where they cannot be read."""
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) else [value]
    try:
        return [v.untyped_storage() for v in values if isinstance(v, torch.Tensor)]
    # Sparse and nested tensors have none of their own.
    except RuntimeError:
        return []
