"""Labels: the axes of every dimension of every tensor in a graph.

Each op says, by its rule, which axes of its inputs and outputs are one index space. An op without a
rule ends the axes of its inputs, and new ones begin: nothing is guessed from sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Graph, Node

from dit_opt.facts.axes import (
    Axis,
    Dim,
    Origin,
    axis_of,
    join,
    leaves,
    size,
    unify,
)
from dit_opt.facts.nodes import (
    find_data,
    find_proved_sizes,
    holds_tensor,
    input_name,
    is_user_input,
    sizes_of,
)
from dit_opt.facts.ops import Trait, op_name, traits_of
from dit_opt.facts.sizes import are_equal
from dit_opt.facts.spans import Spans, apply_spans

log = logging.getLogger(__name__)

# One entry per dimension of a tensor; a tuple of labels for a tuple of tensors; None for what is
# no tensor.
Label: TypeAlias = "list[Dim] | tuple[Any, ...] | None"
Rule: TypeAlias = Callable[..., Any]

# A sweep sees what earlier ones unified, as the segments of a tensor that were not known yet where
# it is sliced.
SWEEPS = 3
INPUTS = ("placeholder", "get_attr")


class NoRule(Exception):
    """An op in a form that its rule does not know."""


class Labels:
    """The axes of all values of a graph, worked out by the rules in `rules`.

    Args:
        graph: pre-grad graph; nodes hold fake tensors in `meta["example_value"]`. It is read only.
        rules: one function per op name, called with the labels and the node's arguments.
        hints: how the tokens of inputs lie, where an earlier graph proved it.

    Attributes:
        joins: (dims, dim) of each reshape that merges dimensions of a constant table.
        ended: by axis, the last node at which it ends.
        disputed: axes for which two tables have different structures.
        ends: by node, the dimensions whose axes end there: it indexes or mixes their elements, or
            its operands disagree.
        makes: by node, the dimensions whose axes begin there.
        unknown: by node, why no rule labelled it.
    """

    def __init__(
        self, graph: Graph, rules: dict[str, Rule], hints: Mapping[Node, Spans] | None = None
    ) -> None:
        self.node: Node
        self.joins: list[tuple[tuple[Dim, ...], Dim]] = []
        self.ended: dict[Axis, Node] = {}
        self.disputed: set[Axis] = set()
        self.ends: dict[Node, list[Dim]] = {}
        self.makes: dict[Node, list[Dim]] = {}
        self.unknown: dict[Node, str] = {}
        self._labels: dict[Node, Label] = {}
        self._memo: dict[tuple[Any, ...], Axis] = {}
        self._rules = rules
        self._hints = hints or {}
        self._nodes = tuple(n for n in graph.nodes if n.op != "output")
        self._data = find_data(self._nodes)
        self._sizes: dict[int, tuple[sympy.Expr, ...]] = {}
        self._proved = find_proved_sizes(self._nodes)
        for _ in range(SWEEPS):
            before = dict(self._labels)
            for record in (self.joins, self.ended, self.ends, self.makes, self.unknown):
                record.clear()
            for node in self._nodes:
                if node.op not in INPUTS or node not in before:
                    self._labels[node] = self._visit(node)
            if self._labels == before:
                break

    def __getitem__(self, node: Any) -> list[Dim]:
        """The dimensions of a tensor. Raises NoRule for anything else."""
        label = self._labels.get(node) if isinstance(node, Node) else None
        if not isinstance(label, list):
            raise NoRule(f"{node} is no tensor")
        return label

    def label_of(self, node: Node) -> Label:
        return self._labels.get(node)

    def dims_of(self, node: Node) -> list[Dim]:
        """All dimensions of a tensor, or of all tensors of a tuple; none of anything else."""
        return _dims(self._labels.get(node))

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, Node) and isinstance(self._labels.get(value), list)

    def _visit(self, node: Node) -> Label:
        self.node, name = node, op_name(node)
        value = node.meta.get("example_value")
        if node.op in INPUTS:
            label = self._begin(value, node, "")
            for d, spans in self._hints.get(node, ()):
                apply_spans(_dims(label)[d], spans)
            return label
        if not holds_tensor(value) and name != "setitem":
            return None
        rule = self._rules.get(name)
        if rule is None and traits_of(name) & Trait.POINTWISE:
            rule = self._rules["pointwise"]
        try:
            if rule is None:
                raise NoRule(f"{name} has no rule")
            label = rule(self, *node.args, **node.kwargs)
            if self._fits(label, value):
                return label
            reason: Exception = NoRule("sizes of the rule and of the tensor differ")
        # Arguments that a rule does not expect end the axes; they must not fail the compilation.
        except (
            NoRule,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
        ) as error:
            reason = error
        log.debug("No label for %s (%s): %s", node.name, name, reason)
        self.unknown[node] = str(reason)
        for source in node.all_input_nodes:
            for dim in self.dims_of(source):
                self.end(dim)
        return self._begin(value, None, f"made by `{name}` (node {node.name})")

    def _begin(self, value: Any, source: Node | None, note: str) -> Label:
        """New axes for a value; `source` is the graph input that it is, or None."""
        if isinstance(value, (tuple, list)):
            return tuple(
                self._begin_one(v, source, note, (i,)) if isinstance(v, torch.Tensor) else None
                for i, v in enumerate(value)
            )
        return self._begin_one(value, source, note, ()) if isinstance(value, torch.Tensor) else None

    def _begin_one(
        self, value: torch.Tensor, source: Node | None, note: str, slot: tuple[int, ...]
    ) -> list[Dim]:
        lengths = self._sizes_of(value)
        if source is None:
            return [self.new((*slot, i), length, (), note) for i, length in enumerate(lengths)]
        name, user = input_name(source), is_user_input(source)
        extents = sum(length != 1 for length in lengths)
        floating = value.is_floating_point() or value.is_complex()
        return [
            self.new(
                (*slot, i), length, [Origin(name, i, len(lengths), extents, floating, user)], note
            )
            for i, length in enumerate(lengths)
        ]

    def _fits(self, label: Label, value: Any) -> bool:
        """Whether a label has the sizes of the value: a wrong rule must not pass."""
        if isinstance(value, (tuple, list)):
            return (
                isinstance(label, tuple)
                and len(label) == len(value)
                and all(map(self._fits, label, value))
            )
        if not isinstance(value, torch.Tensor):
            return label is None
        return (
            isinstance(label, list)
            and len(label) == value.dim()
            and all(
                are_equal(size(d), s) for d, s in zip(label, self._sizes_of(value), strict=True)
            )
        )

    # Called by rules.

    def new(
        self, slot: Any, length: sympy.Expr, origins: Iterable[Origin] = (), note: str = ""
    ) -> Dim:
        """A dimension of one new axis, the same in every sweep; `slot` is its key in the node."""
        dim = self._once(slot, length, origins, note)
        self.makes.setdefault(self.node, []).append(dim)
        return dim

    def _once(
        self, slot: Any, length: sympy.Expr, origins: Iterable[Origin] = (), note: str = ""
    ) -> Dim:
        if length == 1:
            return ()
        key = (self.node, slot, length)
        if key not in self._memo:
            if not note and not origins:
                note = f"made by `{op_name(self.node)}` (node {self.node.name})"
            self._memo[key] = axis_of(length, origins, note)[0]
        return (self._memo[key],)

    def join(self, dims: Sequence[Dim], slot: Any) -> Dim:
        """The concatenation of dimensions: one axis, the same in every sweep."""
        length = sum((size(d) for d in dims), sympy.S.Zero)
        return () if length == 1 else join(dims, self._once(slot, length)[0])

    def end(self, dim: Dim) -> None:
        """End the axes of a dimension: the op indexes or mixes its elements."""
        self.ends.setdefault(self.node, []).append(dim)
        for leaf in leaves(dim):
            self.ended[leaf] = self.node

    def agree(self, *dims: Dim) -> Dim:
        """Unify dimensions that an op iterates over together; those of size 1 broadcast.

        Raises NoRule where they cannot be unified.
        """
        wide = [d for d in dims if size(d) != 1]
        for other in wide[1:]:
            if not unify(wide[0], other):
                raise NoRule(f"sizes or structures of {size(wide[0])} and {size(other)} clash")
        return wide[0] if wide else ()

    def tie(self, x: Dim, y: Dim) -> None:
        """Unify two dimensions; where they cannot be, both end."""
        if not unify(x, y):
            self.end(x)
            self.end(y)

    def sizes(self, part: int | None = None) -> tuple[sympy.Expr, ...]:
        """The sizes of the node's own value, read from its fake tensor."""
        value = self.node.meta.get("example_value")
        if part is not None:
            value = value[part] if isinstance(value, (tuple, list)) else None
        if not isinstance(value, torch.Tensor):
            raise NoRule("the value is no tensor")
        return self._sizes_of(value)

    def _sizes_of(self, value: torch.Tensor) -> tuple[sympy.Expr, ...]:
        # Nodes keep their fake tensors alive, so that an id names one tensor.
        if id(value) not in self._sizes:
            sizes: tuple[Any, ...] = sizes_of(value)
            if self._proved:
                sizes = tuple(s.xreplace(self._proved) for s in sizes)
            self._sizes[id(value)] = sizes
        return self._sizes[id(value)]

    def parts(self) -> int:
        """How many tensors the node's value has."""
        value = self.node.meta.get("example_value")
        if not isinstance(value, (tuple, list)):
            raise NoRule("the value is no tuple")
        return len(value)

    def is_table(self, node: Node) -> bool:
        """Whether a value depends on weights and sizes only, as position tables do."""
        return node not in self._data


def _dims(label: Label) -> list[Dim]:
    if isinstance(label, tuple):
        return [dim for part in label for dim in _dims(part)]
    return label or []
