"""Writes in place that a permutation would cut off from other names of the same memory.

A gather copies. Where a graph writes to one side of it and later reads the other, the copy would
miss the write, so such graphs keep their order.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

from torch.fx import Node

from dit_opt._compat import writes_in_place
from dit_opt.facts.nodes import op_name
from dit_opt.facts.order_modes import Modes

__all__ = ["VIEWS", "find_stale_write", "find_targets"]

# Ops whose result may be another name of their first argument.
VIEWS = set(
    "reshape view flatten unflatten squeeze ravel unsqueeze permute transpose swapaxes swapdims "
    "movedim moveaxis numpy_T t mT getattr expand expand_as broadcast_to view_as_complex "
    "view_as_real real imag conj positive getitem split chunk split_with_sizes tensor_split narrow "
    "unbind select to float double half bfloat16 long int bool type type_as contiguous detach "
    "dropout cpu cuda requires_grad _get_data_attr alias".split()
)
_OPERATORS = set(
    "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul "
    "iconcat".split()
)
# They end in an underscore and write nothing.
_PURE = set("and_ or_ not_ xor_ requires_grad_".split())
_ACTIVATIONS = set(
    "relu relu6 leaky_relu elu selu celu silu mish hardswish hardsigmoid hardtanh threshold rrelu "
    "dropout".split()
)

# A value: as its node makes it, in the order, or with the order undone. Each is a memory of its own
# unless the node is a view.
Name: TypeAlias = "tuple[Node, str]"
RAW, ORDERED, UNDONE = "raw", "ordered", "undone"
INPUTS = ("placeholder", "get_attr")


def find_stale_write(modes: Modes) -> Node | None:
    """The first write in place that a value read later, or the caller of the graph, would miss."""
    position = {node: i for i, node in enumerate(modes.nodes)}
    writes = [(node, _read(modes, t, node)) for node in modes.nodes for t in find_targets(node)]
    if not writes:
        return None
    memory, family = _Sets(), _Sets()
    created: dict[Name, int] = {}
    last_read: dict[Name, int] = {}
    for node in modes.nodes:
        own = _made(modes, node)
        created[own] = position[node]
        for source in node.all_input_nodes:
            name = _read(modes, source, node)
            created.setdefault(name, position[node if name[1] == UNDONE else source])
            last_read[name] = position[node]
            family.unite(_made(modes, source), name)
            if source in _aliased(modes, node):
                memory.unite(name, own)
                family.unite(name, own)
    members = defaultdict(list)
    for name in created:
        members[family.find(name)].append(name)
    for node, target in writes:
        # A shape that is changed in place changes under an older name, too.
        reshaped = op_name(node) in VIEWS and modes.holds(node)
        if target[1] == UNDONE or reshaped:
            return node
        for name in members[family.find(target)]:
            if memory.find(name) == memory.find(target):
                continue
            stale = created[name] < position[node] < last_read.get(name, -1)
            if stale or (name[0].op in INPUTS and name[1] == RAW):
                return node
    return None


def _made(modes: Modes, node: Node) -> Name:
    """The value as its node makes it."""
    return node, ORDERED if modes.is_ordered(node) else RAW


def _read(modes: Modes, source: Node, reader: Node) -> Name:
    """The value as a node reads it."""
    if not modes.holds(source):
        return source, RAW
    if modes.is_entry(source):
        return source, RAW if reader in modes.plain else ORDERED
    return source, UNDONE if reader in modes.plain else ORDERED


def find_targets(node: Node) -> list[Node]:
    """The values that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if writes_in_place(node.target):
        return list(node.all_input_nodes)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _PURE
    flagged = name in _ACTIVATIONS and (
        node.kwargs.get("inplace") is True or any(a is True for a in node.args[1:])
    )
    targets = [node.kwargs.get("out")]
    if in_place or flagged or name in _OPERATORS:
        targets += [node.args[0] if node.args else node.kwargs.get("input")]
    # `out` and what `_foreach_` ops write to may be several.
    lists = [t if isinstance(t, (list, tuple)) else [t] for t in targets]
    return [t for several in lists for t in several if isinstance(t, Node)]


def _aliased(modes: Modes, node: Node) -> list[Node]:
    """The values of which a node's own may be another name."""
    if node in modes.labels.unknown:
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
