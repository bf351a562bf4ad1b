"""Writes in place that a permutation would cut off from other names of the same memory.

A gather copies. Where a graph writes to one side of it and later reads the other, the copy would
miss the write, so such graphs keep their order.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

from torch.fx import Node

from dit_opt.facts.nodes import op_name
from dit_opt.facts.order_map import OrderMap
from dit_opt.facts.writes import VIEWS, find_targets

__all__ = ["find_stale_write"]

# A value: as its node makes it, in the order, or with the order undone. Each is a memory of its own
# unless the node is a view.
Name: TypeAlias = "tuple[Node, str]"
RAW, ORDERED, UNDONE = "raw", "ordered", "undone"
INPUTS = ("placeholder", "get_attr")


def find_stale_write(orders: OrderMap) -> Node | None:
    """The first write in place that a value read later, or the caller of the graph, would miss."""
    position = {node: i for i, node in enumerate(orders.nodes)}
    writes = [(node, _read(orders, t, node)) for node in orders.nodes for t in find_targets(node)]
    if not writes:
        return None
    memory, family = _Sets(), _Sets()
    created: dict[Name, int] = {}
    last_read: dict[Name, int] = {}
    for node in orders.nodes:
        own = _made(orders, node)
        created[own] = position[node]
        for source in node.all_input_nodes:
            name = _read(orders, source, node)
            created.setdefault(name, position[node if name[1] == UNDONE else source])
            last_read[name] = position[node]
            family.unite(_made(orders, source), name)
            if source in _aliased(orders, node):
                memory.unite(name, own)
                family.unite(name, own)
    members = defaultdict(list)
    for name in created:
        members[family.find(name)].append(name)
    for node, target in writes:
        # A shape that is changed in place changes under an older name, too.
        reshaped = op_name(node) in VIEWS and orders.holds(node)
        if target[1] == UNDONE or reshaped:
            return node
        for name in members[family.find(target)]:
            if memory.find(name) == memory.find(target):
                continue
            stale = created[name] < position[node] < last_read.get(name, -1)
            if stale or (name[0].op in INPUTS and name[1] == RAW):
                return node
    return None


def _made(orders: OrderMap, node: Node) -> Name:
    """The value as its node makes it."""
    return node, ORDERED if orders.is_ordered(node) else RAW


def _read(orders: OrderMap, source: Node, reader: Node) -> Name:
    """The value as a node reads it."""
    if not orders.holds(source):
        return source, RAW
    if orders.is_entry(source):
        return source, RAW if reader in orders.pinned else ORDERED
    return source, UNDONE if reader in orders.pinned else ORDERED


def _aliased(orders: OrderMap, node: Node) -> list[Node]:
    """The values of which a node's own may be another name."""
    if node in orders.labels.unknown:
        return node.all_input_nodes
    if op_name(node) not in VIEWS:
        return find_targets(node)
    first = node.args[0] if node.args else None
    return [first] if isinstance(first, Node) else node.all_input_nodes


class _Sets:
    """Disjoint sets of names."""

    def __init__(self) -> None:
        self._parents: dict[Name, Name] = {}

    def find(self, name: Name) -> Name:
        while (parent := self._parents.get(name, name)) != name:
            self._parents[name] = self._parents.get(parent, parent)
            name = parent
        return name

    def unite(self, a: Name, b: Name) -> None:
        self._parents[self.find(a)] = self.find(b)
