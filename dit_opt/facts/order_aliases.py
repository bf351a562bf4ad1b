"""In-place writes that aliases of the same memory would miss once tokens are permuted.

A gather copies. Where a graph writes to its input and later reads its output, or the other way
round, the write would be missed, so such graphs keep the model's order.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

from torch.fx import Node

from dit_opt.facts.ops import Trait, has
from dit_opt.facts.order_map import OrderMap
from dit_opt.facts.writes import find_targets

# A version of a value: as its node makes it (RAW), permuted, or with the permutation undone. Each
# has memory of its own unless the node is a view.
Version: TypeAlias = "tuple[Node, str]"
RAW, ORDERED, UNDONE = "raw", "ordered", "undone"
INPUTS = ("placeholder", "get_attr")


def find_stale_write(orders: OrderMap) -> Node | None:
    """The first write in place that a value read later, or the caller of the graph, would miss."""
    position = {node: i for i, node in enumerate(orders.nodes)}
    writes = [(node, _read(orders, t, node)) for node in orders.nodes for t in find_targets(node)]
    if not writes:
        return None
    memory, family = _Sets(), _Sets()
    created: dict[Version, int] = {}
    last_read: dict[Version, int] = {}
    for node in orders.nodes:
        own = _made(orders, node)
        created[own] = position[node]
        for source in node.all_input_nodes:
            version = _read(orders, source, node)
            created.setdefault(version, position[node if version[1] == UNDONE else source])
            last_read[version] = position[node]
            family.unite(_made(orders, source), version)
            if source in _aliased(orders, node):
                memory.unite(version, own)
                family.unite(version, own)
    members = defaultdict(list)
    for version in created:
        members[family.find(version)].append(version)
    for node, target in writes:
        # A shape that is changed in place changes for the input, too.
        reshaped = has(node, Trait.ALIAS) and orders.holds(node)
        if target[1] == UNDONE or reshaped:
            return node
        for version in members[family.find(target)]:
            if memory.find(version) == memory.find(target):
                continue
            stale = created[version] < position[node] < last_read.get(version, -1)
            if stale or (version[0].op in INPUTS and version[1] == RAW):
                return node
    return None


def _made(orders: OrderMap, node: Node) -> Version:
    """The version that a node makes."""
    return node, ORDERED if orders.is_ordered(node) else RAW


def _read(orders: OrderMap, source: Node, reader: Node) -> Version:
    """The version that a node reads."""
    if not orders.holds(source):
        return source, RAW
    if orders.is_entry(source):
        return source, RAW if reader in orders.pinned else ORDERED
    return source, UNDONE if reader in orders.pinned else ORDERED


def _aliased(orders: OrderMap, node: Node) -> list[Node]:
    """The inputs that the value of a node may alias."""
    if node in orders.labels.unknown:
        return node.all_input_nodes
    if not has(node, Trait.ALIAS):
        return find_targets(node)
    first = node.args[0] if node.args else None
    return [first] if isinstance(first, Node) else node.all_input_nodes


class _Sets:
    """Disjoint sets of versions."""

    def __init__(self) -> None:
        self._parents: dict[Version, Version] = {}

    def find(self, version: Version) -> Version:
        while (parent := self._parents.get(version, version)) != version:
            self._parents[version] = self._parents.get(parent, parent)
            version = parent
        return version

    def unite(self, a: Version, b: Version) -> None:
        self._parents[self.find(a)] = self.find(b)
