"""Writes in place, and the other names under which what is written may be read.

Whoever reads a value at another place of the graph than the model did must know that nothing wrote
to its memory in between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from dit_opt._compat import writes_in_place
from dit_opt.facts.nodes import holds_tensor, op_name

__all__ = ["VIEWS", "find_bases", "find_targets", "find_write"]

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


def find_bases(node: Node) -> list[Node]:
    """The inputs of which a node's value may be another name, by its op or by its fake storage."""
    bases = find_targets(node)
    if op_name(node) in VIEWS:
        first = node.args[0] if node.args else None
        bases += [first] if isinstance(first, Node) else node.all_input_nodes
    # Views that the list above lacks, as one operand's `einsum`; and every view of other libraries.
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
    """A write, none of the known ones, to the memory of one of the nodes, under any of its names.

    It comes after that node was made, or after `after` where that is given, and before `before`.
    """
    # The nodes are mostly names of each other.
    bases = cache(find_bases)

    def find_views(node: Node) -> list[Node]:
        return [user for user in node.users if node in bases(user)]

    for node in nodes:
        for name in _reach(_reach([node], bases), find_views):
            for user in name.users:
                if user <= (after or node) or (before and user >= before) or user in known:
                    continue
                if name in find_targets(user):
                    return user
    return None


def _reach(nodes: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """All tensors that steps lead to from the nodes, with the nodes."""
    waiting, met = list(nodes), set(nodes)
    while waiting:
        for found in step(waiting.pop()):
            # A size is another name of nothing.
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
