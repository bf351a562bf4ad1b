"""RMS norms as models write them, read backwards from the normalised tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch.fx import Node

from dit_opt.facts.nodes import shape_of, tensor_of
from dit_opt.facts.ops import argument, is_op
from dit_opt.facts.rotation import strip_casts


@dataclass(frozen=True)
class Norm:
    """`x * rsqrt(mean(x^2) + eps) * weight`, over a head's channels, or over those of all heads."""

    eps: float
    weight: Node | None
    across_heads: bool = False


def match_norm(node: Node) -> tuple[Node, Norm, list[Node]] | None:
    """An RMS norm over the last dimension: its input, and the nodes from there to `node`."""
    if is_op(node, "rms_norm"):
        source, shape = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
        weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
        if not isinstance(source, Node) or not _is_eps(eps) or len(shape) != 1:
            return None
        return (
            None if _as_weight(weight, node) is not weight else (source, Norm(eps, weight), [node])
        )
    if not is_op(node, "mul"):
        return None
    bare = _match_bare_norm(node)
    if bare is not None:
        return bare
    for scaled, weight in (node.args, node.args[::-1]):
        if not isinstance(scaled, Node) or _as_weight(weight, node) is None:
            continue
        inner, casts = strip_casts(scaled)
        bare = _match_bare_norm(inner)
        if bare is not None:
            source, norm, interior = bare
            return source, replace(norm, weight=_as_weight(weight, node)), [node, *casts, *interior]
    return None


def _match_bare_norm(node: Node) -> tuple[Node, Norm, list[Node]] | None:
    """`x * rsqrt(mean(x^2, -1) + eps)`."""
    if not is_op(node, "mul"):
        return None
    for value, factor in (node.args, node.args[::-1]):
        if not isinstance(value, Node) or not isinstance(factor, Node):
            continue
        chain: list[Node] = [node]
        for name in ("rsqrt", "add", "mean", "pow"):
            if not isinstance(factor, Node) or not is_op(factor, name):
                break
            chain.append(factor)
            factor = factor.args[0]
        else:
            _, _, total, mean, square = chain
            axis = argument(mean, 1, "dim")
            keeps = argument(mean, 2, "keepdim", False)
            eps = total.args[1]
            same, casts = strip_casts(factor)
            source = strip_casts(value)[0]
            is_norm = square.args[1] == 2 and axis in (-1, [-1], (-1,)) and keeps is True
            if is_norm and same is source and _is_eps(eps) and not total.kwargs:
                return source, Norm(eps, None), [*chain, *casts]
    return None


def _is_eps(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) and value >= 0


def _as_weight(value: Any, normed: Node) -> Node | None:
    """A vector with a factor for each channel of what is normalised."""
    if tensor_of(value) is None or tensor_of(normed) is None:
        return None
    return value if shape_of(value) == shape_of(normed)[-1:] else None
