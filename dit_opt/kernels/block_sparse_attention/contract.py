"""What every implementation of the op accepts and returns: the argument checks and the outputs.

The real and the fake kernels share this file, so they cannot disagree about a shape or a stride.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, as the schema names them."""

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    indices: Tensor
    key_bias: Tensor | None
    scale: float
    block_q: int
    block_k: int
    centroids: Tensor | None = None
    values: Tensor | None = None
    log_lengths: Tensor | None = None
    with_lse: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to attend with, or nothing to attend to."""
        nothing_listed = self.indices.shape[-1] == 0 and not self.tail
        return self.q.numel() == 0 or self.k.shape[2] == 0 or nothing_listed

    @property
    def tail(self) -> list[Tensor]:
        """The summaries of key blocks that are there: all three, or none."""
        given = [self.centroids, self.values, self.log_lengths]
        return [tensor for tensor in given if tensor is not None]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that is there."""
        given = [self.q, self.k, self.v, self.counts, self.indices, self.key_bias, *self.tail]
        return [tensor for tensor in given if tensor is not None]


@dataclass(frozen=True)
class Rule:
    """One requirement: `holds` may return a SymBool, which is left for the real call to judge."""

    holds: Callable[[Arguments], Any]
    error: type[Exception]
    message: Callable[[Arguments], str]


def ceil_div(size: int, block: int) -> int:
    """Number of blocks of `block` tokens that cover `size` tokens."""
    return (size + block - 1) // block


def check_arguments(arguments: Arguments) -> None:
    """Raise on the first rule that the arguments break.

    Reads shapes, dtypes and devices only, never data. A condition on symbolic sizes is skipped
    rather than evaluated, because evaluating it would add a guard to the graph being traced; the
    real kernel checks the same rule again on numbers.

    Raises:
        TypeError: a dtype that the op does not take.
        ValueError: shapes, devices or block sizes that do not fit together.
        RuntimeError: an input that requires grad while grad mode is on.
    """
    for rule in RULES:
        if _is_false(rule.holds(arguments)):
            raise rule.error(f"block_sparse_attention: {rule.message(arguments)}")


def new_outputs(q: Tensor, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Allocate `out` and `lse` for queries of shape [B, H, Nq, D].

    `out` has the shape of `q` over memory laid out as [B, Nq, H, D], so that the flattening of
    heads that follows attention in every model is a view; `lse` is float32 [B, H, Nq], or [B, H, 0]
    without `with_lse`.
    """
    batch, heads, tokens, dim = q.shape
    out = q.new_empty((batch, tokens, heads, dim)).transpose(1, 2)
    lse = q.new_empty((batch, heads, tokens if with_lse else 0), dtype=torch.float32)
    return out, lse


def _is_false(condition: Any) -> bool:
    """Whether a condition is known to be false; symbolic ones are not known."""
    return isinstance(condition, bool) and not condition


def _all(*conditions: Any) -> Any:
    """False if one is known to be false, else True."""
    return not any(_is_false(condition) for condition in conditions)


def _one_or(size: Any, full: Any) -> Any:
    """Whether a size broadcasts to `full`; True where symbolic sizes leave it open."""
    return not (_is_false(size == 1) and _is_false(size == full))


def _requires_grad(arguments: Arguments) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in arguments.tensors)


def _shapes(a: Arguments) -> str:
    return f"q {tuple(a.q.shape)}, k {tuple(a.k.shape)}, v {tuple(a.v.shape)}"


def _plan_fits(a: Arguments) -> Any:
    batch, heads, tokens, _ = a.q.shape
    same = [_one_or(a.counts.shape[0], batch), a.counts.shape[1] == heads]
    same.append(a.counts.shape[2] == ceil_div(tokens, a.block_q))
    same += [x == y for x, y in zip(a.indices.shape[:3], a.counts.shape, strict=True)]
    return _all(*same)


def _bias_fits(a: Arguments) -> Any:
    if a.key_bias is None:
        return True
    if a.key_bias.dim() != 3:
        return False
    batch, heads, keys = a.key_bias.shape
    fits = (_one_or(batch, a.q.shape[0]), _one_or(heads, a.q.shape[1]), keys == a.k.shape[2])
    return _all(*fits)


def _tail_has_dtypes(a: Arguments) -> bool:
    if not a.tail:
        return True
    centroids, values, log_lengths = a.tail
    return centroids.dtype == values.dtype == a.q.dtype and log_lengths.dtype == torch.float32


def _tail_fits(a: Arguments) -> Any:
    if not a.tail:
        return True
    centroids, values, log_lengths = a.tail
    if centroids.dim() != 4 or values.dim() != 4 or log_lengths.dim() != 3:
        return False
    batch, heads, _, dim = a.q.shape
    key_heads, keys = a.k.shape[1:3]
    blocks = ceil_div(keys, a.block_k)
    same = [x == y for x, y in zip(centroids.shape, values.shape, strict=True)]
    same += [centroids.shape[0] == batch, centroids.shape[2] == blocks, centroids.shape[3] == dim]
    of_heads = (centroids.shape[1] == key_heads, centroids.shape[1] == heads)
    same.append(not all(_is_false(is_equal) for is_equal in of_heads))
    same += [_one_or(log_lengths.shape[0], batch), _one_or(log_lengths.shape[1], heads)]
    same.append(log_lengths.shape[2] == blocks)
    return _all(*same)


RULES: tuple[Rule, ...] = (
    Rule(
        lambda a: a.q.dtype in DTYPES,
        TypeError,
        lambda a: (
            f"q has dtype {a.q.dtype}, but only float32, float16 and bfloat16 are supported; "
            "cast the inputs or leave this attention dense."
        ),
    ),
    Rule(
        lambda a: a.q.dtype == a.k.dtype == a.v.dtype,
        TypeError,
        lambda a: f"q, k and v must have one dtype, not {a.q.dtype}, {a.k.dtype} and {a.v.dtype}.",
    ),
    Rule(
        lambda a: a.counts.dtype == a.indices.dtype == torch.int32,
        TypeError,
        lambda a: (
            f"counts and indices must be int32, not {a.counts.dtype} and {a.indices.dtype}; "
            "convert the plan once, when it is made."
        ),
    ),
    Rule(
        lambda a: a.key_bias is None or a.key_bias.dtype == torch.float32,
        TypeError,
        lambda a: (
            "key_bias must be additive float32 (0 keeps a key, -inf removes it), "
            f"not {a.key_bias.dtype if a.key_bias is not None else None}."
        ),
    ),
    Rule(
        lambda a: len(a.tail) in (0, 3),
        TypeError,
        lambda a: (
            f"the centroid tail needs centroids, values and log_lengths, but only {len(a.tail)} of "
            "the three were given; pass all that summarize_blocks returns, or none."
        ),
    ),
    Rule(
        _tail_has_dtypes,
        TypeError,
        lambda a: (
            f"the tail must hold centroids and values in the dtype of q, {a.q.dtype}, and float32 "
            f"log_lengths, not {', '.join(str(tensor.dtype) for tensor in a.tail)}."
        ),
    ),
    Rule(
        lambda a: not _requires_grad(a),
        RuntimeError,
        lambda a: (
            "an input requires grad, but ditopt is for inference only; call the model under "
            "torch.inference_mode() or torch.no_grad()."
        ),
    ),
    Rule(
        lambda a: a.q.dim() == a.k.dim() == a.v.dim() == 4,
        ValueError,
        lambda a: f"q, k and v must be [B, H, N, D], not {_shapes(a)}.",
    ),
    Rule(
        lambda a: _all(
            a.q.shape[0] == a.k.shape[0],
            a.q.shape[3] == a.k.shape[3],
            *(x == y for x, y in zip(a.k.shape, a.v.shape, strict=True)),
        ),
        ValueError,
        lambda a: f"q, k and v must agree in B and D, and k and v in all sizes: {_shapes(a)}.",
    ),
    Rule(
        lambda a: _all(a.q.shape[3] >= 1, a.q.shape[3] <= MAX_HEAD_DIM),
        ValueError,
        lambda a: f"the head dimension must be 1 to {MAX_HEAD_DIM}, not {a.q.shape[3]}.",
    ),
    Rule(
        lambda a: _all(a.k.shape[1] >= 1, a.q.shape[1] % a.k.shape[1] == 0),
        ValueError,
        lambda a: (
            f"{a.q.shape[1]} query heads are no multiple of {a.k.shape[1]} key heads; "
            "grouped-query attention needs equal groups."
        ),
    ),
    Rule(
        lambda a: all(size >= 16 and size & (size - 1) == 0 for size in (a.block_q, a.block_k)),
        ValueError,
        lambda a: f"block_q={a.block_q} and block_k={a.block_k} must be powers of two, 16 or more.",
    ),
    Rule(
        lambda a: a.scale > 0,
        ValueError,
        lambda a: f"scale must be positive, not {a.scale}; move the sign of the scores into q.",
    ),
    Rule(
        lambda a: a.counts.dim() == 3 and a.indices.dim() == 4,
        ValueError,
        lambda a: (
            "counts must be [B or 1, H, nq] and indices [B or 1, H, nq, capacity], "
            f"not {tuple(a.counts.shape)} and {tuple(a.indices.shape)}."
        ),
    ),
    Rule(
        _plan_fits,
        ValueError,
        lambda a: (
            f"the plan, counts {tuple(a.counts.shape)} and indices {tuple(a.indices.shape)}, does "
            f"not fit q {tuple(a.q.shape)} in query blocks of {a.block_q}: expected "
            f"[{a.q.shape[0]} or 1, {a.q.shape[1]}, {ceil_div(a.q.shape[2], a.block_q)}]."
        ),
    ),
    Rule(
        _bias_fits,
        ValueError,
        lambda a: (
            f"key_bias must be [B or 1, H or 1, Nk], not "
            f"{tuple(a.key_bias.shape) if a.key_bias is not None else None}, for {_shapes(a)}."
        ),
    ),
    Rule(
        _tail_fits,
        ValueError,
        lambda a: (
            f"the tail, {', '.join(str(tuple(tensor.shape)) for tensor in a.tail)}, does not fit "
            f"{_shapes(a)} in key blocks of {a.block_k}: expected centroids and values [B, Hk or "
            "H, nk, D] and log_lengths [B or 1, H or 1, nk]; use the block_k of the call in "
            "summarize_blocks."
        ),
    ),
    Rule(
        lambda a: len({tensor.device for tensor in a.tensors}) == 1,
        ValueError,
        lambda a: (
            "all inputs must be on one device, not "
            f"{', '.join(sorted({str(tensor.device) for tensor in a.tensors}))}."
        ),
    ),
)
