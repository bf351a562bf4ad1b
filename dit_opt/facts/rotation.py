"""Rotary embeddings as models write them, read backwards from the rotated tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dit_opt.facts.nodes import shape_of, sizes_of, tensor_of
from dit_opt.facts.ops import Trait, argument, has, is_op

_EVERY = slice(None, None, None)


@dataclass(frozen=True)
class Rotation:
    """`out_a = a cos_a - b sin_a`, `out_b = b cos_b + a sin_b` for pairs of channels (a, b).

    Attributes:
        source: what is rotated, a head's channels last.
        cos, sin: tables with tokens along one dimension and channels, or pairs of channels, last;
            all other dimensions have length 1.
        halves: a pair is (i, i + D / 2); else it is (2 i, 2 i + 1).
        interior: the nodes from the source to the rotated tensor.
    """

    source: Node
    cos: Node
    sin: Node
    halves: bool
    interior: tuple[Node, ...]


def strip_casts(node: Any) -> tuple[Node, list[Node]]:
    """A value before changes of its dtype or memory layout, and the nodes that make them."""
    dropped: list[Node] = []
    while has(node, Trait.CAST | Trait.COPY) and _keeps_device(node):
        dropped.append(node)
        node = node.args[0]
    return node, dropped


def match_rotation(node: Node, token_dim: int) -> Rotation | None:
    """The rotation that ends in `node`, a rank-4 tensor with tokens along `token_dim`.

    Known are `x cos + rotate(x) sin` with tables of all channels, where `rotate` stacks or
    concatenates `(-b, a)`, and two indexed writes into an empty tensor with tables of pairs. No
    table and no tensor may be broadcast along tokens or channels.
    """
    found, each = _match_sum(node), 1
    if found is None:
        found, each = _match_writes(node), 2
    if found is None:
        return None
    sizes = list(shape_of(found.source))
    if len(sizes) != 4 or sizes != list(shape_of(node)):
        return None
    table = [1, 1, 1, sizes[3] / each]
    table[token_dim] = sizes[token_dim]
    return found if all(list(shape_of(t)) == table for t in (found.cos, found.sin)) else None


def _match_sum(node: Node) -> Rotation | None:
    for (plain, cos), (turned, sin) in _read_products(node, "add"):
        source, casts = strip_casts(plain)
        rotated, more = strip_casts(turned)
        match = _match_rotated(rotated)
        if match is None or strip_casts(match[0])[0] is not source:
            continue
        split, halves, interior = match
        interior = [*interior, *strip_casts(split)[1]]
        products = [n for n in node.args if isinstance(n, Node)]
        nodes = (node, *products, *casts, *more, *interior)
        return Rotation(source, cos, sin, halves, nodes)
    return None


def _match_rotated(node: Node) -> tuple[Node, bool, list[Node]] | None:
    """(tensor, whether split by halves, nodes) where pairs (a, b) became (-b, a), else None."""
    interior = [node]
    if is_op(node, "flatten") and isinstance(node.args[0], Node):
        stack, halves = node.args[0], False
        if not is_op(stack, "stack") or argument(stack, 1, "dim", 0) not in (-1, 4):
            return None
        interior.append(stack)
        if node.args[1:] not in ((3,), (-2,)):
            return None
    elif is_op(node, "cat"):
        stack, halves = node, True
        if argument(stack, 1, "dim", 0) not in (-1, 3):
            return None
    else:
        return None
    pieces = stack.args[0]
    if not isinstance(pieces, (list, tuple)) or len(pieces) != 2:
        return None
    negated, a = pieces
    if not isinstance(negated, Node) or not is_op(negated, "neg"):
        return None
    first, second = _read_member(a), _read_member(negated.args[0])
    if first is None or second is None or (first[1], second[1]) != (0, 1):
        return None
    if first[0] is not second[0] or first[2] != halves or second[2] != halves:
        return None
    nodes = [n for n in (negated, a, negated.args[0]) if isinstance(n, Node)]
    return first[0], halves, [*interior, *nodes, *first[3]]


def _match_writes(node: Node) -> Rotation | None:
    """`out = empty_like(x); out[..., 0::2] = a cos - b sin; out[..., 1::2] = a sin + b cos`."""
    if not is_op(node, "empty_like"):
        return None
    writes = [u for u in node.users if is_op(u, "setitem") and u.args[0] is node]
    reads = [u for u in node.users if u not in writes]
    if len(writes) != 2 or not reads or max(writes) > min(reads):
        return None
    even, odd = (
        next((u.args[2] for u in writes if u.args[1] == (..., slice(first, None, 2))), None)
        for first in (0, 1)
    )
    if not isinstance(even, Node) or not isinstance(odd, Node):
        return None
    for (a, cos), (b, sin) in _read_products(even, "sub"):
        first, second = _read_member(a), _read_member(b)
        if first is None or second is None or first[0] is not second[0]:
            continue
        if (first[1:3], second[1:3]) != ((0, False), (1, False)):
            continue
        for one, other in _read_products(odd, "add"):
            if {one, other} != {(a, sin), (b, cos)}:
                continue
            products = [n for e in (even, odd) for n in e.args if isinstance(n, Node)]
            nodes = (node, *writes, even, odd, *products, a, b, *first[3])
            return Rotation(first[0], cos, sin, False, nodes)
    return None


def _read_products(node: Node, name: str) -> Iterator[tuple[tuple[Node, Node], ...]]:
    """The ways to read `p * q + r * s`, or with "sub" `p * q - r * s`, as two pairs of nodes."""
    if not is_op(node, name) or len(node.args) != 2 or node.kwargs:
        return
    products = [n.args for n in node.args if isinstance(n, Node) and is_op(n, "mul")]
    factors = [[n for n in args if isinstance(n, Node)] for args in products]
    if [len(pair) for pair in factors] != [2, 2]:
        return
    (p, q), (r, s) = factors
    sums = [((p, q), (r, s))]
    if name == "add":
        sums.append(((r, s), (p, q)))
    for (p, q), (r, s) in sums:
        for one in ((p, q), (q, p)):
            for other in ((r, s), (s, r)):
                yield one, other


def _read_member(node: Any) -> tuple[Node, int, bool, list[Node]] | None:
    """(tensor, 0 or 1, whether split by halves, nodes) of one channel of each pair, else None."""
    if not is_op(node, "getitem"):
        return None
    unbind, index = node.args
    if not isinstance(unbind, Node) or not is_op(unbind, "unbind") or index not in (0, 1):
        return None
    split: Any = unbind.args[0]
    axis = argument(unbind, 1, "dim", 0)
    if not has(split, Trait.RESHAPE):
        return None
    source = split.args[0]
    if not isinstance(source, Node):
        return None
    before, after = shape_of(source), shape_of(split)
    if len(before) != 4 or len(after) != 5 or before[:3] != after[:3]:
        return None
    halves = axis in (-2, 3)
    if after[3 if halves else 4] != 2 or axis not in (-1, 4, -2, 3):
        return None
    return source, int(index), halves, [node, unbind, split]


def _keeps_device(node: Node) -> bool:
    before, after = tensor_of(node.args[0]), tensor_of(node)
    return (
        before is not None
        and after is not None
        and before.device == after.device
        and sizes_of(before) == sizes_of(after)
        and after.is_floating_point()
        # a model that rounds to 8 bits does it on purpose
        and after.dtype.itemsize > 1
    )
