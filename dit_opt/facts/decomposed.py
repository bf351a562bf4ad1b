"""Attention written out as softmax(q k^T * scale + mask) v, read backwards from its last product.

Older attention processors and hand-written models write it so, and then no fused kernel ever runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from dit_opt.decisions import AttentionReason
from dit_opt.facts.nodes import shape_of, tensor_of
from dit_opt.facts.ops import Trait, argument, has, is_op
from dit_opt.facts.writes import find_targets, find_write


@dataclass(frozen=True)
class Decomposed:
    """What the nodes of one written-out attention mean; see `sites.Site` for the fields.

    Without a readable path from the softmax to q and k, those are None and `refusal` says why.
    """

    node: Node
    value: Node
    query: Node | None = None
    key: Node | None = None
    mask: Node | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    interior: tuple[Node, ...] = ()
    refusal: AttentionReason | None = None
    detail: str = ""


def match_decomposed(node: Node) -> Decomposed | None:
    """The attention whose last product `node` is, or None if it is no such product.

    A match with a refusal is attention that cannot be written as one call: it drops weights at
    random, its scores are used or written elsewhere, or they pass through an unknown operation.
    """
    product = _read_product(node)
    if product is None or product[2]:
        return None
    weights, value, _ = product
    found = Decomposed(node, value)
    while not is_op(weights, "softmax"):
        if is_op(weights, "dropout"):
            p, training = argument(weights, 1, "p", 0.5), argument(weights, 2, "training", True)
            found = replace(found, dropout_p=float(p) if training else 0.0)
        elif not _is_cast(weights):
            return None
        found = replace(found, interior=(weights, *found.interior))
        weights = weights.args[0]
        if not isinstance(weights, Node):
            return None
    if argument(weights, 1, "dim") not in (-1, _rank(weights) - 1):
        return None
    found = replace(found, interior=(weights, *found.interior))
    scores = weights.args[0] if weights.args else weights.kwargs.get("input")
    complete = _read_scores(scores, found)
    if complete is not None:
        reason, detail = _find_refusal(complete)
        return replace(complete, refusal=reason, detail=detail)
    if _find_product(scores) is None:
        return None
    return replace(found, refusal=AttentionReason.UNREADABLE_SCORES, detail=str(scores))


def _read_product(node: Any) -> tuple[Node, Node, bool] | None:
    """The factors of a batched matrix product; True where the second one is transposed."""
    if is_op(node, "einsum"):
        factors = node.args[1:]
        if len(factors) == 2 and isinstance(node.args[0], str):
            transposed = _read_equation(node.args[0])
            if transposed is not None:
                return (*factors, transposed)
    if not is_op(node, "matmul", "bmm"):
        return None
    factors = [*node.args, *node.kwargs.values()]
    if len(factors) != 2 or not all(isinstance(f, Node) for f in factors):
        return None
    return factors[0], factors[1], False


def _read_equation(equation: str) -> bool | None:
    """False for "..ij,..jd->..id", True for "..id,..jd->..ij", None for anything else."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    batch = output[:-2]
    if not output[-2:].isalpha() or (left[:-2], right[:-2]) != (batch, batch):
        return None
    (a, b), (c, d), (e, f) = left[-2:], right[-2:], output[-2:]
    if (a, b, d) == (e, c, f):
        return False
    return True if (a, b, c) == (e, d, f) else None


def _read_scores(node: Any, found: Decomposed) -> Decomposed | None:
    """Follow the scores back to q k^T; None where an operation cannot be read."""
    if not isinstance(node, Node):
        return None
    found = replace(found, interior=(node, *found.interior))
    if _is_cast(node):
        return _read_scores(node.args[0], found)
    if is_op(node, "add") and found.mask is None and found.scale == 1.0:
        left, right = node.args[0], argument(node, 1, "other")
        if "alpha" in node.kwargs:
            return None
        for scores, mask in ((left, right), (right, left)):
            if _is_additive(mask):
                complete = _read_scores(scores, replace(found, mask=mask))
                if complete is not None:
                    return complete
        return None
    if is_op(node, "mul", "div"):
        scores, factor = node.args[0], argument(node, 1, "other")
        if is_op(node, "mul") and isinstance(factor, Node):
            scores, factor = factor, scores
        # a mask that was added before would be scaled too
        if isinstance(factor, (int, float)) and "rounding_mode" not in node.kwargs:
            complete = _read_scores(scores, replace(found, mask=None))
            if complete is None or complete.mask is not None:
                return None
            factor = float(factor) if is_op(node, "mul") else 1.0 / factor
            return replace(complete, mask=found.mask, scale=complete.scale * factor)
        return None
    if is_op(node, "baddbmm"):
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if len(node.args) != 3 or not isinstance(alpha, (int, float)) or beta not in (0, 1):
            return None
        if beta == 1:
            if found.mask is not None or not _is_additive(node.args[0]):
                return None
            found = replace(found, mask=node.args[0])
        return _read_factors(node.args[1], node.args[2], False, replace(found, scale=float(alpha)))
    product = _read_product(node)
    return None if product is None else _read_factors(*product, found)


def _is_additive(mask: Any) -> bool:
    """Whether a mask is floating: adding booleans adds 0 and 1, where SDPA reads a selection."""
    dtype = _dtype(mask) if isinstance(mask, Node) else None
    return dtype is not None and dtype.is_floating_point


def _read_factors(q: Any, k: Any, transposed: bool, found: Decomposed) -> Decomposed | None:
    key = k if transposed else _untranspose(k)
    if key is None or not isinstance(q, Node):
        return None
    return replace(found, query=_uncast(q, found.value), key=_uncast(key, found.value))


def _untranspose(node: Any) -> Node | None:
    """What `node` is the transpose of, in its last two dimensions."""
    rank = _rank(node)
    if is_op(node, "transpose"):
        dims = {d % rank for d in node.args[1:3] if isinstance(d, int)}
        return node.args[0] if dims == {rank - 2, rank - 1} else None
    if is_op(node, "permute"):
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return node.args[0] if [d % rank for d in dims] == swapped else None
    return node.args[0] if is_op(node, "getattr") and node.args[1] == "mT" else None


def _is_cast(node: Any) -> bool:
    """A cast to a floating dtype; rounding to 8 bits or integers is no mere cast."""
    dtype = _dtype(node) if has(node, Trait.CAST) else None
    return dtype is not None and dtype.is_floating_point and dtype.itemsize > 1


def _uncast(node: Node, value: Node) -> Node:
    """Undo an upcast of q or k to float32: fused kernels add up in float32 by themselves."""
    if _is_cast(node) and isinstance(node.args[0], Node):
        inner = node.args[0]
        if _dtype(node) == torch.float32 and _dtype(inner) == _dtype(value):
            return inner
    return node


def _find_refusal(found: Decomposed) -> tuple[AttentionReason | None, str]:
    """What one call of scaled_dot_product_attention cannot express, or (None, "")."""
    inside = {*found.interior, found.node}
    escaping = [n.name for n in found.interior if not inside.issuperset(n.users)]
    tensors = [n for n in (found.query, found.key, found.value) if n is not None]
    if escaping:
        return AttentionReason.SHARED_INTERMEDIATE, ", ".join(escaping)
    write = _find_late_write(found)
    if write is not None:
        return AttentionReason.SHARED_INTERMEDIATE, f"written in place by {write.name}"
    if found.dropout_p:
        return AttentionReason.DROPOUT, f"p={found.dropout_p}"
    dtypes = [_dtype(n) for n in tensors]
    if len(set(dtypes)) > 1:
        return AttentionReason.UNSUPPORTED_DTYPE, ", ".join(map(str, dtypes))
    if _rank(found.node) not in (3, 4) or len({shape_of(n)[:-2] for n in tensors}) > 1:
        shapes = [str(tuple(n.meta["example_value"].shape)) for n in tensors]
        return AttentionReason.UNSUPPORTED_SHAPE, ", ".join(shapes)
    return None, ""


def _find_late_write(found: Decomposed) -> Node | None:
    """A write that makes one call differ from the written-out form.

    The call reads query, key and mask at the last product; the scores read them earlier.
    """
    for node in found.interior:
        # As `mask += scores` or any `out=`: the call would not make it.
        if not set(found.interior).issuperset(find_targets(node)):
            return node
    product = found.interior[0]
    factors = _read_product(product) or product.args[1:]
    for factor, operand in zip(factors, (found.query, found.key), strict=False):
        assert operand is not None
        casts = _find_casts(factor, operand)
        write = find_write([operand, *casts], after=min([product, *casts]), before=found.node)
        if write is not None:
            return write
    if found.mask is None:
        return None
    reader = min(n for n in found.interior if found.mask in n.all_input_nodes)
    return find_write([found.mask], after=reader, before=found.node)


def _find_casts(factor: Any, operand: Node) -> list[Node]:
    """The casts between an operand and a product, which copy; transposes are views."""
    casts = []
    while factor is not operand:
        casts += [factor] if _is_cast(factor) else []
        factor = factor.args[0]
    return casts


def _find_product(scores: Any, depth: int = 8) -> Node | None:
    """A matrix product that `scores` comes from through operations that keep its shape."""
    if not isinstance(scores, Node) or depth == 0:
        return None
    if _read_product(scores) is not None or is_op(scores, "baddbmm"):
        return scores
    for node in scores.all_input_nodes:
        if _rank(node) == _rank(scores) and shape_of(node) == shape_of(scores):
            product = _find_product(node, depth - 1)
            if product is not None:
                return product
    return None


def _rank(node: Any) -> int:
    value = tensor_of(node)
    return -1 if value is None else value.dim()


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor_of(node)
    return None if value is None else value.dtype
