"""Block-sparse attention over tokens that each head reads in an order of its own.

Where nothing but attention wants the tokens in that order, they need no tensors of their own: a
processor writes them to memory that it has used before, which costs a quarter of a fresh copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention import cpu
from dit_opt.kernels.block_sparse_attention.contract import (
    Arguments,
    check_arguments,
    new_outputs,
)
from dit_opt.kernels.token_moves import (
    gather_bias,
    gather_tokens,
    number_rows,
    scatter_tokens,
)

_NAME = "ditopt::ordered_attention_v1"

torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor inverse, Tensor counts, Tensor indices, "
    "Tensor? key_bias, float scale, int block_q, int block_k) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


def attend_in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    inverse: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> Tensor:
    """Gather, attend, scatter: the specification, and what runs where there is nothing faster.

    Args:
        q: [B, H, N, D]; k, v: [B, Hk, N, D], any strides, in the model's own order of tokens.
        rows: int64 [B, H, N], the token at each place of a head's order; inverse: the place of
            each token.
        counts, indices: the lists of `block_sparse_attention`, in the order of each head.
        key_bias: additive float32 [B or 1, H or 1, N] in the model's own order, or None.
        scale, block_q, block_k: those of `block_sparse_attention`.

    Returns:
        The output in the model's own order, shaped and laid out as `block_sparse_attention` does.

    Raises:
        TypeError, ValueError, RuntimeError: as `block_sparse_attention`.
        ValueError: orders that are not int64 [B, H, N].
    """
    _check(q, k, v, rows, inverse, counts, indices, key_bias, scale, block_q, block_k)
    bias = None if key_bias is None else gather_bias(key_bias, rows)
    out, _ = torch.ops.ditopt.block_sparse_attention_v3(
        *(gather_tokens(x, rows) for x in (q, k, v)), counts, indices, bias, scale, block_q, block_k
    )
    return scatter_tokens(out, inverse)


@torch.library.impl(_NAME, "CPU")
def _run_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    inverse: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> Tensor:
    _check(q, k, v, rows, inverse, counts, indices, key_bias, scale, block_q, block_k)
    out, _ = new_outputs(q, with_lse=False)
    if q.numel() == 0:
        return out
    bias = None if key_bias is None else gather_bias(key_bias, rows)
    plan, blocks = (counts, indices), (block_q, block_k)
    padded, _ = cpu.attend_padded(q, k, v, *plan, bias, scale, *blocks, with_lse=False, rows=rows)
    table, index = number_rows(padded, inverse)
    index, memory = index.transpose(1, 2).flatten(), out.transpose(1, 2).view(-1, q.shape[3])
    if table.dtype == out.dtype:
        torch.index_select(table, 0, index, out=memory)
    else:
        memory.copy_(table.index_select(0, index))
    return out


@torch.library.register_fake(_NAME)
def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    inverse: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> Tensor:
    _check(q, k, v, rows, inverse, counts, indices, key_bias, scale, block_q, block_k)
    return new_outputs(q, with_lse=False)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    inverse: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
) -> None:
    check_arguments(Arguments(q, k, v, counts, indices, key_bias, scale, block_q, block_k))
    orders = (rows, inverse)
    fits = all(x.dtype == torch.int64 and x.dim() == 3 for x in orders)
    sizes = (
        [(x.shape[axis], q.shape[axis]) for x in orders for axis in range(x.dim())] if fits else []
    )
    sizes.append((k.shape[2], q.shape[2]))
    # A symbolic comparison is left for the real call to judge.
    if not fits or any(isinstance(a == b, bool) and a != b for a, b in sizes):
        raise ValueError(
            f"ordered_attention: rows and inverse must be int64 [B, H, N], not {rows.dtype} "
            f"{tuple(rows.shape)} and {inverse.dtype} {tuple(inverse.shape)}, for q "
            f"{tuple(q.shape)} and k {tuple(k.shape)}."
        )


torch.library.impl(_NAME, "CUDA", attend_in_order)
