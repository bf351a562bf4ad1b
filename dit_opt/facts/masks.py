"""What an attention mask says, proved from its shape or from how the graph builds it.

The sparse kernel takes one value per key. Models write that in two forms: broadcast over the
queries, or as the outer product of a validity vector with itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node

from dit_opt._compat import size_expression
from dit_opt.facts.sites import Site


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
    queries and the other over the keys, with no in-place write to either. OTHER: anything else.
    """
    mask = site.mask
    if mask is None:
        return Mask(MaskKind.NONE)
    if site.query is None or site.key is None or _shape(mask) is None:
        return Mask(MaskKind.OTHER)
    rank, keys = _example(site.query).dim(), _shape(site.key)[-2]
    shape = _shape(mask)
    if shape[-1] != keys:
        return Mask(MaskKind.OTHER)
    # A shorter mask is aligned to the right, so its first dimension is no batch.
    inner = shape[1:-1] if len(shape) == rank else shape[:-1]
    if all(size == 1 for size in inner):
        return Mask(MaskKind.KEY_PADDING, mask)
    vector = _trace(mask)
    if vector is not None and vector.dim == len(shape) - 1 and vector.is_clean():
        return Mask(MaskKind.KEY_PADDING, vector.root)
    return _classify_outer(mask, len(shape))


def _classify_outer(mask: Node, rank: int) -> Mask:
    path: list[Node] = []
    node: Any = mask
    while _is_identity(node):
        path.append(node)
        node = node.args[0]
    if isinstance(node, Node) and node.target in _AND and len(node.args) == 2:
        path.append(node)
        vectors = [_trace(a) for a in node.args if isinstance(a, Node)]
        if len(vectors) == 2 and vectors[0] is not None and vectors[1] is not None:
            by_dim = {v.dim: v for v in vectors if v is not None}
            roots = {v.root for v in by_dim.values()}
            clean = all(v.is_clean() for v in by_dim.values()) and not _is_written(path)
            if set(by_dim) == {rank - 2, rank - 1} and len(roots) == 1 and clean:
                return Mask(MaskKind.OUTER, by_dim[rank - 1].root)
    return Mask(MaskKind.OTHER)


# Boolean tensors only: & of integers is no conjunction.
_AND = (operator.and_, torch.logical_and, torch.bitwise_and, "logical_and", "__and__")
_VIEWS = ("view", "reshape", "unsqueeze", "squeeze")
_CASTS = ("bool", "to", "float", "type", "contiguous", "clone")
_VIEW_FUNCTIONS = {torch.reshape: "reshape", torch.unsqueeze: "unsqueeze"}


@dataclass(frozen=True)
class _Vector:
    """A tensor that depends on its batch and on one other dimension only.

    Its value at index i is `root[b, i[dim]]`, for a root `[B, N]` or `[N]` with dimensions of 1.
    """

    root: Node
    dim: int
    path: tuple[Node, ...]

    def is_clean(self) -> bool:
        """Whether nothing on the way from the root is written in place."""
        return not _is_written(self.path)


def _trace(node: Node) -> _Vector | None:
    """Follow a mask back through broadcasts, transposes and views to what it is made of."""
    shape = _shape(node)
    if shape is None or not shape:
        return None
    source = node.args[0] if node.args else None
    name = _name(node)
    if name in ("expand", "repeat", "transpose") and isinstance(source, Node):
        inner = _trace(source)
        inner_shape = _shape(source)
        if inner is None or inner_shape is None:
            return None
        if name == "transpose":
            a, b = (d % len(shape) for d in node.args[1:3])
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
            # dimensions before the batch would take its place
            if added and inner.dim != 0 and inner_shape[0] != 1:
                return None
        return _Vector(inner.root, dim, (*inner.path, node))
    if _is_identity(node):
        inner = _trace(node.args[0])
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
    while _name(path[-1]) in _VIEWS or _is_new_axis(path[-1]):
        source = path[-1].args[0]
        inner = _shape(source) if isinstance(source, Node) else None
        if inner is None or [s for s in inner if s != 1] != wanted:
            break
        path.append(source)
    roots = [n for n in path if _shape(n)[-1] == shape[long[0]]]
    return _Vector(roots[-1], long[0], tuple(path)) if roots else None


def _is_new_axis(node: Any) -> bool:
    """`x[:, None, :]`: full slices and new axes only."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)


def _is_identity(node: Any) -> bool:
    """A cast or copy that keeps the dtype."""
    if _name(node) not in _CASTS or not isinstance(node.args[0], Node):
        return False
    return _shape(node.args[0]) is not None and _example(node.args[0]).dtype == _example(node).dtype


def _is_written(path: tuple[Node, ...] | list[Node]) -> bool:
    """Whether the memory behind any of the nodes is written in place, as far as views show."""
    seen: set[Node] = set()
    stack = list(path)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if _writes(user) and user.args and user.args[0] is node:
                return True
            if _shares(user):
                stack.append(user)
        if _shares(node):
            stack += [n for n in node.args if isinstance(n, Node)]
    return False


def _writes(node: Node) -> bool:
    name = str(node.target)
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.target in (operator.setitem, *_IN_PLACE_OPERATORS)


_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.iand, operator.ior)


def _shares(node: Node) -> bool:
    """Whether the result may be the memory of the first argument."""
    names = (*_VIEWS, *_CASTS, "expand", "transpose", "permute", "select", "narrow", "getitem")
    return _name(node) in names or node.target is operator.getitem


def _name(node: Any) -> str:
    if not isinstance(node, Node):
        return ""
    if node.op == "call_method":
        return str(node.target)
    return _VIEW_FUNCTIONS.get(node.target, getattr(node.target, "__name__", ""))


def _example(node: Node) -> torch.Tensor:
    return node.meta["example_value"]


def _shape(node: Node) -> Any:
    """Sizes as sympy expressions (comparing SymInts would add guards); None for other values."""
    value = node.meta.get("example_value")
    return tuple(map(size_expression, value.shape)) if isinstance(value, torch.Tensor) else None
