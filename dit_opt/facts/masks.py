"""What an attention mask says, proved from its shape or from how the graph builds it.

The sparse kernel takes one value per key. Models write that in two forms: broadcast over the
queries, or as the outer product of a validity vector with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node

from dit_opt.facts.nodes import example_of, shape_of, tensor_of
from dit_opt.facts.ops import Trait, argument, has, is_op
from dit_opt.facts.sites import Site
from dit_opt.facts.writes import find_write


class MaskKind(Enum):
    """What a mask depends on."""

    NONE = "none"
    KEY_PADDING = "key padding"
    OUTER = "query-valid x key-valid"
    OTHER = "other"


class Mask(NamedTuple):
    """A mask, classified.

    Attributes:
        kind: what it depends on.
        keys: `[..., N]` with at most a batch before the keys, boolean or additive, made before the
            site; None for NONE and OTHER. For OUTER it is the validity vector, and rows of queries
            that are not valid see no key at all: exact attention gives zeros there, so whoever
            replaces the site by key padding alone must write them, or show that nobody reads them.
    """

    kind: MaskKind
    keys: Node | None = None


def classify_mask(site: Site) -> Mask:
    """Tell what a site's mask depends on.

    KEY_PADDING: every dimension but the batch and the keys is 1, or was made from such a tensor by
    expand or repeat. OUTER: `a & b`, both made from one `[B, N]` tensor, one broadcast over the
    queries and the other over the keys. OTHER: anything else, as a mask of lower rank than the
    query that differs between heads, or one that is made with writes in place.
    """
    mask = site.mask
    if mask is None:
        return Mask(MaskKind.NONE)
    if site.query is None or site.key is None:
        return Mask(MaskKind.OTHER)
    shape = shape_of(mask)
    # A mask of higher rank than the query would broadcast the result.
    if not 0 < len(shape) <= len(shape_of(site.query)) or shape[-1] != shape_of(site.key)[-2]:
        return Mask(MaskKind.OTHER)
    if all(size == 1 for size in shape[1:-1]) and _is_batch(shape[:-1], site):
        return Mask(MaskKind.KEY_PADDING, mask)
    vector = _trace(mask)
    if vector is None or vector.dim != len(shape) - 1:
        found = _classify_outer(mask, site)
    elif _is_written(vector.path, vector.root, site):
        found = Mask(MaskKind.OTHER)
    else:
        found = Mask(MaskKind.KEY_PADDING, vector.root)
    if found.keys is None or _is_batch(shape_of(found.keys)[:-1], site):
        return found
    return Mask(MaskKind.OTHER)


def _is_batch(sizes: tuple[sympy.Expr, ...], site: Site) -> bool:
    """Whether the dimensions of a mask before its keys are all 1, or the batch of the site."""
    assert site.mask is not None and site.query is not None
    if all(size == 1 for size in sizes):
        return True
    mask, query = shape_of(site.mask), shape_of(site.query)
    # A mask of lower rank is aligned to the right, so its first dimension is no batch. Against a
    # query with a batch of 1, it would broadcast the result.
    return len(mask) == len(query) and query[0] != 1


def _classify_outer(mask: Node, site: Site) -> Mask:
    path: list[Node] = []
    node: Any = mask
    rank = len(shape_of(mask))
    while _is_identity(node):
        path.append(node)
        node = node.args[0]
    if isinstance(node, Node) and _is_conjunction(node):
        path.append(node)
        vectors = [_trace(a) for a in node.args if isinstance(a, Node)]
        if len(vectors) == 2 and vectors[0] is not None and vectors[1] is not None:
            by_dim = {v.dim: v for v in vectors if v is not None}
            (root, *others) = {v.root for v in by_dim.values()}
            path += [n for v in by_dim.values() for n in v.path]
            if set(by_dim) == {rank - 2, rank - 1} and not others:
                if not _is_written(path, root, site):
                    return Mask(MaskKind.OUTER, root)
    return Mask(MaskKind.OTHER)


def _is_conjunction(node: Node) -> bool:
    if len(node.args) != 2:
        return False
    # A product of numbers is added to scores.
    value = tensor_of(node)
    of_bools = value is not None and value.dtype == torch.bool
    return is_op(node, "bitwise_and", "logical_and") or (of_bools and is_op(node, "mul"))


def _is_written(path: Sequence[Node], root: Node, site: Site) -> bool:
    """Whether a value between root and mask is written to after it was read and before the site."""
    made = min((n for n in path if n is not root), default=site.node)
    return find_write(path, after=made, before=site.node) is not None


@dataclass(frozen=True)
class _Vector:
    """A tensor that depends on its batch and on one other dimension only.

    Its value at index i is `root[b, i[dim]]`, for a root `[B, N]` or `[N]` with dimensions of 1.
    """

    root: Node
    dim: int
    path: tuple[Node, ...]


def _trace(node: Node) -> _Vector | None:
    """Follow a mask back through broadcasts, transposes and views to what it is made of."""
    shape = shape_of(node)
    if not shape:
        return None
    source = node.args[0] if node.args else None
    if is_op(node, "expand", "repeat", "transpose") and isinstance(source, Node):
        inner = _trace(source)
        inner_shape = shape_of(source)
        if inner is None:
            return None
        if is_op(node, "transpose"):
            # `swapaxes` has keywords of its own
            a, b = (
                argument(node, i + 1, f"dim{i}", node.kwargs.get(f"axis{i}")) % len(shape)
                for i in range(2)
            )
            # the batch stays where it is
            if 0 in (a, b) and inner_shape[0] != 1:
                return None
            dim = {a: b, b: a}.get(inner.dim, inner.dim)
        else:
            added = len(shape) - len(inner_shape)
            dim = inner.dim + added
            grown = [d for d, size in enumerate(inner_shape) if size != shape[d + added]]
            if any(inner_shape[d] != 1 for d in grown) or inner.dim in grown:
                return None
            # new dimensions in front would move the batch
            if added and inner.dim != 0 and inner_shape[0] != 1:
                return None
        return _Vector(inner.root, dim, (*inner.path, node))
    if isinstance(source, Node) and _is_identity(node):
        inner = _trace(source)
        return None if inner is None else _Vector(inner.root, inner.dim, (*inner.path, node))
    return _read_vector(node, shape)


def _read_vector(node: Node, shape: tuple[sympy.Expr, ...]) -> _Vector | None:
    """A tensor whose dimensions are 1 but for the first and one other."""
    long = [d for d in range(1, len(shape)) if shape[d] != 1]
    if len(shape) == 1:
        long = [0]
    if len(long) != 1:
        return None
    path, wanted = [node], [s for s in shape if s != 1]
    # views that only insert or drop ones keep the order of the values
    while has(path[-1], Trait.RESHAPE) or _is_new_axis(path[-1]):
        source = path[-1].args[0]
        if not isinstance(source, Node) or tensor_of(source) is None:
            break
        if [size for size in shape_of(source) if size != 1] != wanted:
            break
        path.append(source)
    ends = [i for i, n in enumerate(path) if shape_of(n)[-1] == shape[long[0]]]
    return _Vector(path[ends[-1]], long[0], tuple(path[: ends[-1] + 1])) if ends else None


def _is_new_axis(node: Any) -> bool:
    """`x[:, None, :]`: full slices and new axes only."""
    if not is_op(node, "getitem"):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)


def _is_identity(node: Any) -> bool:
    """A cast or copy that keeps the dtype."""
    source = tensor_of(node.args[0]) if has(node, Trait.CAST | Trait.COPY) else None
    return source is not None and source.dtype == example_of(node).dtype
