"""Rules for ops that take tensors apart or join them: slices, splits, concatenations, writes.

Text and latents meet in a concatenation and part in slices, so these rules are what tells segments
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch.fx import Node

from dit_opt.facts.axes import Dim, cut, resolve, segments, size
from dit_opt.facts.labels import Labels, NoRule, Rule
from dit_opt.facts.nodes import number_of
from dit_opt.facts.sizes import are_equal, divide


def take(labels: Labels, dim: Dim, start: sympy.Expr | None, length: sympy.Expr, slot: Any) -> Dim:
    """`length` indices from `start` on (None: unknown); an axis ends unless segments stay whole."""
    if are_equal(length, size(dim)):
        return dim
    dim = resolve(dim)
    if start is not None:
        whole = _whole_segments(segments(dim), start, length)
        if whole is not None:
            return labels.join(whole, ("part", slot))
        inner = size(dim[1:])
        steps = divide(length, inner)
        if len(dim) > 1 and steps is not None and divide(start, inner) is not None:
            labels.end(dim[:1])
            return labels.new(("part", slot), steps, dim[0].origins) + dim[1:]
    labels.end(dim)
    origins = dim[0].origins if len(dim) == 1 else ()
    return labels.new(("part", slot), length, origins)


def _whole_segments(
    parts: Sequence[Dim], start: sympy.Expr, length: sympy.Expr
) -> list[Dim] | None:
    """The segments that a slice covers, where it begins and ends at their borders."""
    at = sympy.S.Zero
    for i in range(len(parts)):
        if are_equal(at, start):
            total = sympy.S.Zero
            for j in range(i, len(parts)):
                total += size(parts[j])
                if are_equal(total, length):
                    return list(parts[i : j + 1])
            return None
        at += size(parts[i])
    return None


def _bounds(
    dim: Dim, index: slice, length: sympy.Expr | None
) -> tuple[sympy.Expr | None, sympy.Expr]:
    """(start, None where unknown; length) of a slice of step 1; `length`: the result's if known."""
    total = size(dim)
    start = _position(index.start, total, sympy.S.Zero)
    if length is None:
        stop = _position(index.stop, total, total)
        if start is None or stop is None:
            raise NoRule("a bound of the slice is unknown")
        if all(n.is_Integer for n in (start, stop, total)):
            return start, sympy.Integer(max(0, min(int(stop), int(total)) - int(start)))
        length = stop - start
    return start, length


def _position(bound: Any, total: sympy.Expr, default: sympy.Expr) -> sympy.Expr | None:
    if bound is None:
        return default
    number = number_of(bound)
    if number is None:
        return None
    if number.is_negative:
        at = sympy.expand(total + number)
        return sympy.Max(0, at) if at.is_Integer else at
    return number if number.is_nonnegative else None


def index(labels: Labels, x: Node, items: Any, lengths: Sequence[sympy.Expr] | None) -> list[Dim]:
    """`x[items]`; `lengths`: sizes of the result, None where it is written to and has no node."""
    label, out, d = labels[x], [], 0
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    if sum(labels.is_tensor(i) for i in items) > 1:
        raise NoRule("several index tensors")
    for k, item in enumerate(items):
        if item is None:
            out.append(())
        elif item is Ellipsis:
            rest = len(label) - d - sum(i is not None for i in items[k + 1 :])
            out += label[d : d + rest]
            d += rest
        elif isinstance(item, slice):
            out.append(_slice(labels, label[d], item, lengths, len(out), k))
            d += 1
        elif labels.is_tensor(item):
            if isinstance(item, Node) and str(item.meta["example_value"].dtype) == "torch.bool":
                raise NoRule("a mask index: how many entries remain is data")
            labels.end(label[d])
            out += labels[item]
            d += 1
        elif number_of(item) is not None:
            labels.end(label[d])
            d += 1
        else:
            raise NoRule(f"index {item}")
    return out + label[d:]


def _slice(
    labels: Labels, dim: Dim, item: slice, lengths: Sequence[sympy.Expr] | None, at: int, slot: int
) -> Dim:
    if item == slice(None):
        return dim
    if item.step not in (None, 1):
        labels.end(dim)
        if lengths is None:
            return ()
        return labels.new(("step", slot), lengths[at])
    start, length = _bounds(dim, item, None if lengths is None else lengths[at])
    return take(labels, dim, start, length, ("index", slot))


def getitem(labels: Labels, x: Any, items: Any) -> Any:
    label = labels.label_of(x)
    if isinstance(label, tuple):
        return label[items]
    return index(labels, x, items, labels.sizes())


def setitem(labels: Labels, x: Any, items: Any, value: Any) -> None:
    """A buffer filled slice by slice is a concatenation of what is written."""
    label = labels[x]
    for dim, item in zip(label, items if isinstance(items, tuple) else (items,), strict=False):
        if item is Ellipsis or item is None:
            break
        if isinstance(item, slice) and item.step in (None, 1):
            _cut_at(dim, item)
    # A number is written at positions, too.
    target = index(labels, x, items, None)
    if labels.is_tensor(value):
        for dim, other in zip(reversed(target), reversed(labels[value]), strict=False):
            if are_equal(size(dim), size(other)):
                labels.tie(dim, other)
            elif size(other) != 1:
                labels.end(dim)
                labels.end(other)


def _cut_at(dim: Dim, item: slice) -> None:
    dim = resolve(dim)
    if len(dim) != 1 or not dim[0].is_leaf:
        return
    start, length = _bounds(dim, item, None)
    if start is None:
        return
    pieces = [p for p in (start, length, sympy.expand(size(dim) - start - length)) if p != 0]
    if len(pieces) > 1 and all(p.is_positive for p in pieces):
        cut(dim[0], pieces)


def split(labels: Labels, x: Node, *args: Any, dim: int = 0, **_: Any) -> tuple[list[Dim], ...]:
    """`split`, `chunk` and their kin: the sizes are read from the results."""
    if len(args) > 1:
        dim = args[1]
    label, out, at = labels[x], [], sympy.S.Zero
    for i in range(labels.parts()):
        length = labels.sizes(i)[dim]
        part = list(label)
        part[dim] = take(labels, label[dim], at, length, i)
        out.append(part)
        at += length
    return tuple(out)


def narrow(labels: Labels, x: Node, dim: int, start: Any, length: Any) -> list[Dim]:
    label = list(labels[x])
    at = _position(start, size(label[dim]), sympy.S.Zero)
    label[dim] = take(labels, label[dim], at, labels.sizes()[dim], "narrow")
    return label


def unbind(labels: Labels, x: Node, dim: int = 0) -> tuple[list[Dim], ...]:
    label = list(labels[x])
    labels.end(label.pop(dim))
    return tuple(list(label) for _ in range(labels.parts()))


def select(labels: Labels, x: Node, dim: int, index: Any) -> list[Dim]:
    label = list(labels[x])
    labels.end(label.pop(dim))
    return label


def index_select(labels: Labels, x: Node, dim: int, index: Node) -> list[Dim]:
    label = list(labels[x])
    labels.end(label[dim])
    label[dim] = labels[index][0] if labels[index] else ()
    return label


def concatenate(labels: Labels, tensors: Any, dim: int = 0, **kwargs: Any) -> list[Dim]:
    dim = kwargs.get("axis", dim)
    # torch lets tensors of shape (0,) take part in any concatenation.
    inputs = [labels[t] for t in tensors if len(labels[t]) > 1 or size(labels[t][0]) != 0]
    dim %= len(inputs[0])
    out = [
        () if i == dim else labels.agree(*(label[i] for label in inputs))
        for i in range(len(inputs[0]))
    ]
    out[dim] = labels.join([label[dim] for label in inputs], "cat")
    return out


def stack(labels: Labels, tensors: Any, dim: int = 0) -> list[Dim]:
    inputs = [labels[t] for t in tensors]
    out = [labels.agree(*dims) for dims in zip(*inputs, strict=True)]
    out.insert(dim % (len(out) + 1), labels.new("stack", sympy.Integer(len(inputs))))
    return out


def pad_sequence(
    labels: Labels,
    sequences: Any,
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> list[Dim]:
    """Sequences as rows: their common prefix is one index space, the rest of each its own."""
    inputs = [labels[t] for t in sequences]
    if padding_side != "right":
        raise NoRule("the sequences are aligned at their ends")
    length = labels.sizes()[int(batch_first)]
    common: list[Dim] = []
    for parts in zip(*(segments(label[0]) for label in inputs), strict=False):
        if not all(are_equal(size(part), size(parts[0])) for part in parts):
            break
        common.append(labels.agree(*parts))
    rest = length - sum(map(size, common), sympy.S.Zero)
    if not are_equal(rest, sympy.S.Zero):
        for label in inputs:
            for part in segments(label[0])[len(common) :]:
                labels.end(part)
        common.append(labels.new("rest", rest))
    batch = labels.new("batch", sympy.Integer(len(inputs)))
    tokens = labels.join(common, "rows")
    others = [labels.agree(*dims) for dims in zip(*(label[1:] for label in inputs), strict=True)]
    return [batch, tokens, *others] if batch_first else [tokens, batch, *others]


def pad(labels: Labels, x: Node, pad: Any, mode: str = "constant", value: Any = None) -> list[Dim]:
    """Constants beside a dimension make a concatenation."""
    label, want = list(labels[x]), labels.sizes()
    for i, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        d = len(label) - 1 - i
        before, after = number_of(low), number_of(high)
        if before == 0 and after == 0:
            continue
        known = [n for n in (before, after) if n is not None and n.is_nonnegative]
        if len(known) == 2 and mode == "constant":
            edges = [labels.new((side, i), n) for side, n in zip(("low", "high"), known)]
            label[d] = labels.join([edges[0], label[d], edges[1]], ("pad", i))
        else:
            labels.end(label[d])
            label[d] = labels.new(("pad", i), want[d])
    return label


PART_RULES: dict[str, Rule] = {
    "getitem": getitem,
    "setitem": setitem,
    **dict.fromkeys("split chunk split_with_sizes tensor_split".split(), split),
    "narrow": narrow,
    "unbind": unbind,
    "select": select,
    "index_select": index_select,
    "cat": concatenate,
    "stack": stack,
    "pad": pad,
    "pad_sequence": pad_sequence,
}
