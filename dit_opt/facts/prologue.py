"""What models do to queries and keys right before attention: RMS norm and rotary embedding.

Read backwards from the arguments of a site. What is read is proved: every operation on the way is
known, and a rotation pairs channels as one of the two usual forms does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from dit_opt.facts.nodes import number_of, shape_of
from dit_opt.facts.ops import Trait, argument, has, is_op
from dit_opt.facts.rms_norm import Norm, match_norm
from dit_opt.facts.rotation import Rotation, match_rotation, strip_casts
from dit_opt.facts.writes import find_write


@dataclass(frozen=True)
class ProloguePart:
    """Tokens that come from one projection.

    Attributes:
        source: `[B, N, H, D]`, `[B, H, N, D]` (`token_dim` 2), or `[B, N, H * D]`. heads: H.
        norm, rotation: in this order, or None.
        start: index of the first rotated token, an int or a node; the tables cover all tokens from
            there on.
    """

    source: Node
    token_dim: int
    heads: int
    norm: Norm | None = None
    rotation: Rotation | None = None
    start: int | Node = 0


@dataclass(frozen=True)
class Prologue:
    """One query or key: its parts follow each other along the tokens.

    `interior` are the nodes between the sources and the argument, in no order.
    """

    node: Node
    parts: tuple[ProloguePart, ...]
    interior: tuple[Node, ...]


def find_prologue(node: Node) -> Prologue | str:
    """The prologue of a query or key `[B, H, N, D]`, or in words why none was read.

    Tokens may be concatenated from parts, before or after their rotation; of one part only some
    may be rotated, as the latents in a stream that holds text too.
    """
    if len(shape_of(node)) != 4:
        return "it is not [B, H, N, D]"
    reader = _PrologueReader()
    try:
        value, token_dim = reader.drop_transpose(node)
        parts = reader.read(value, token_dim)
    # Arguments in an unknown form are a refusal; they must not fail the compilation.
    except (TypeError, IndexError, ValueError, AttributeError) as error:
        return f"an operation is written in a form that is not known ({error})"
    if isinstance(parts, str):
        return parts
    if not any(part.norm or part.rotation for part in parts):
        return "it is neither normalised by its RMS nor rotated"
    interior = tuple(dict.fromkeys(reader.seen))
    if any(p.source.meta["example_value"].dtype != node.meta["example_value"].dtype for p in parts):
        return "its dtype changes on the way"
    known = [n for n in interior if n.target is operator.setitem]
    write = find_write([node, *interior, *(part.source for part in parts)], known)
    if write is None and interior:
        # Tables may be made with writes, but not written once they are read: the kernel reads late.
        read = [t for p in parts for t in (p.rotation and (p.rotation.cos, p.rotation.sin)) or ()]
        read += [p.norm.weight for p in parts if p.norm and p.norm.weight is not None]
        write = find_write(read, known, after=min(interior))
    write = write or next((n for n in interior if "out" in n.kwargs), None)
    if write is not None:
        return f"it is written to in place, by {write.name}"
    return Prologue(node, tuple(parts), interior)


class _PrologueReader:
    """Remembers the nodes that it has read through."""

    def __init__(self) -> None:
        self.seen: list[Node] = []

    def drop_transpose(self, node: Node) -> tuple[Node, int]:
        """(the value before heads and tokens were swapped, if they were; the dim of its tokens)."""
        value = self._strip(node)
        swapped = is_op(value, "transpose") and set(value.args[1:]) in ({1, 2}, {-2, -3})
        order: Any = value.args[1:] if is_op(value, "permute") else ()
        order = order[0] if len(order) == 1 else order
        if swapped or tuple(order) == (0, 2, 1, 3):
            self.seen.append(value)
            return self._strip(value.args[0]), 1
        return value, 2

    def read(self, value: Node, token_dim: int) -> list[ProloguePart] | str:
        """The parts of a tensor whose tokens lie along `token_dim`."""
        value = self._strip(value)
        pieces = _read_cat(value, token_dim)
        if pieces is not None:
            self.seen.append(value)
            return self._read_pieces(pieces, token_dim)
        rotation = match_rotation(value, token_dim)
        if rotation is None:
            return [self._read_norm(value, token_dim)]
        self.seen += rotation.interior
        source = self._strip(rotation.source)
        if _read_cat(source, token_dim) is not None:
            return "it is rotated after its parts were put together"
        return [replace(self._read_norm(source, token_dim), rotation=rotation)]

    def _read_pieces(self, pieces: Sequence[Node], token_dim: int) -> list[ProloguePart] | str:
        parts: list[ProloguePart] = []
        cuts: list[tuple[Node, Any] | None] = []
        for piece in pieces:
            found = self.read(piece, token_dim)
            if isinstance(found, str):
                return found
            parts += found
            cuts += [_read_slice(part.source, token_dim) for part in found]
        if not any(cuts):
            return parts
        # Slices of one tensor: the two sides of a cut, of which one is rotated.
        known = [c for c in cuts if c is not None]
        if len(parts) != 2 or len(known) != 2 or known[0][0] is not known[1][0]:
            return "it is put together from slices that are no two halves of one tensor"
        (whole, (begin, cut)), (_, (other, end)) = known
        if begin not in (None, 0) or end is not None or cut is None or cut != other:
            return "it is put together from slices that do not meet"
        if any(part.norm for part in parts) or (parts[0].rotation and parts[1].rotation):
            return "the two halves of a tensor are normalised or rotated on their own"
        self.seen += [part.source for part in parts]
        joined = self._read_norm(whole, token_dim)
        if parts[1].rotation is None:
            return [replace(joined, rotation=parts[0].rotation)]
        number = number_of(cut)
        if number is None or not number.is_nonnegative:
            return "the first rotated token may be counted from the end"
        return [replace(joined, rotation=parts[1].rotation, start=cut)]

    def _read_norm(self, value: Node, token_dim: int) -> ProloguePart:
        value = self._strip(value)
        norm = match_norm(value)
        if norm is not None:
            source, found, interior = norm
            self.seen += interior
            return ProloguePart(self._strip(source), token_dim, _heads(value, token_dim), found)
        flat = value.args[0] if has(value, Trait.RESHAPE) else None
        if isinstance(flat, Node) and token_dim == 1 and _splits_heads(flat, value):
            norm = match_norm(strip_casts(flat)[0])
            if norm is not None:
                source, found, interior = norm
                self.seen += [value, *strip_casts(flat)[1], *interior]
                across = replace(found, across_heads=True)
                return ProloguePart(self._strip(source), 1, _heads(value, 1), across)
        return ProloguePart(value, token_dim, _heads(value, token_dim))

    def _strip(self, node: Any) -> Node:
        stripped, casts = strip_casts(node)
        self.seen += casts
        return stripped


def _read_cat(node: Node, dim: int) -> Sequence[Node] | None:
    if not is_op(node, "cat"):
        return None
    where = argument(node, 1, "dim", 0)
    pieces = node.args[0] if where in (dim, dim - 4) else None
    if not isinstance(pieces, (list, tuple)):
        return None
    nodes = [piece for piece in pieces if isinstance(piece, Node)]
    return nodes if len(nodes) == len(pieces) else None


def _read_slice(node: Node, dim: int) -> tuple[Node, tuple[Any, Any]] | None:
    """What a node is a slice of along `dim`, and from where to where."""
    if not is_op(node, "getitem") or not isinstance(node.args[1], tuple):
        return None
    *before, last = node.args[1]
    everything = slice(None, None, None)
    if len(before) != dim or any(index != everything for index in before):
        return None
    if not isinstance(last, slice) or last.step not in (None, 1):
        return None
    source = node.args[0]
    return (source, (last.start, last.stop)) if isinstance(source, Node) else None


def _splits_heads(flat: Node, value: Node) -> bool:
    """Whether `[B, N, H * D]` became `[B, N, H, D]`."""
    before, after = shape_of(flat), shape_of(value)
    return (
        len(before) == 3
        and len(after) == 4
        and before[:2] == after[:2]
        and before[2] == math.prod(after[2:])
    )


def _heads(value: Node, token_dim: int) -> int:
    return int(shape_of(value)[3 - token_dim])
