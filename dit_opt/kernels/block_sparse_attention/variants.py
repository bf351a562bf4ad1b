"""What the launchers of the kernel's variants share: what they take, and what they hand on.

A variant is another way of computing the same attention that may be faster on one GPU and is
unproven on others, so nothing chooses one that was not measured there: see `tuning`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.row_order_triton import order_rows
from dit_opt.kernels.block_sparse_attention.tilings import Tiling, is_aligned
from dit_opt.kernels.scores import LOG2_E

DTYPES = (torch.bfloat16, torch.float16)
DIMS = (64, 128)
BLOCK_Q = 128
BLOCKS_K = (64, 128)
_MODULES = {"gluon": "gluon", "specialised": "triton_specialised"}


@dataclass(frozen=True, eq=False)
class Prepared:
    """Outputs to fill, and the arguments that every kernel takes behind its tensors.

    Attributes:
        plan: counts, indices and the order of rows, the longest first, as the kernels name them.
        sizes: scale in units of log2, queries, keys, heads, query heads of a key head, plan heads,
            query blocks, capacity of a list.
        grid: programs by query block and by head.
    """

    out: Tensor
    lse: Tensor
    plan: tuple[Tensor, Tensor, Tensor]
    sizes: tuple[float, int, int, int, int, int, int, int]
    grid: tuple[int, int]


def check_supported(variant: str, call: Arguments) -> None:
    """Raise ValueError unless a call is one that variants are written for."""
    if call.key_bias is not None or call.tail:
        found = "a bias of keys" if call.key_bias is not None else "a tail"
        raise ValueError(
            f"The {variant} variant of block-sparse attention knows neither bias nor tail, but "
            f"{found} was given; leave it out, or use a tiling with variant='plain'."
        )
    q, k, v, block_q, block_k = call.q, call.k, call.v, call.block_q, call.block_k
    dim = q.shape[-1]
    if q.dtype not in DTYPES or dim not in DIMS:
        raise ValueError(
            f"The {variant} variant of block-sparse attention takes bfloat16 and float16 heads of "
            f"64 or 128, not {q.dtype} ones of {dim}; use a tiling with variant='plain'."
        )
    if block_q != BLOCK_Q or block_k not in BLOCKS_K:
        raise ValueError(
            f"The {variant} variant of block-sparse attention takes blocks of 128 queries and 64 "
            f"or 128 keys, not {block_q}x{block_k}; use a tiling with variant='plain'."
        )
    if not all(is_aligned(x) for x in (q, k, v)):
        raise ValueError(
            f"The {variant} variant of block-sparse attention loads rows that are contiguous and "
            f"aligned to 16 bytes, not strides {q.stride()}, {k.stride()} and {v.stride()}; use a "
            "tiling with variant='plain'."
        )


def prepare(call: Arguments) -> Prepared:
    """Allocate the outputs and put the common arguments together; reads no data."""
    out, lse = new_outputs(call.q)
    batch, heads, queries, _ = call.q.shape
    query_blocks = ceil_div(queries, call.block_q)
    counts, indices = call.counts.contiguous(), call.indices.contiguous()
    sizes = (
        call.scale * LOG2_E,
        queries,
        call.k.shape[2],
        heads,
        heads // call.k.shape[1],
        counts.shape[0] * heads,
        query_blocks,
        indices.shape[-1],
    )
    plan = (counts, indices, order_rows(counts))
    return Prepared(out, lse, plan, sizes, (query_blocks, batch * heads))


def is_empty(call: Arguments) -> bool:
    """Whether there is nothing to attend with or to."""
    return call.q.numel() == 0 or call.k.shape[2] == 0 or call.indices.shape[-1] == 0


def launch_variant(call: Arguments, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """`triton.launch` by the kernel that a tiling names.

    Raises ValueError for what that kernel does not take, see `check_supported`.
    """
    # Imported here because Gluon is an experiment of Triton's that may change.
    module = importlib.import_module(f"{__package__}.{_MODULES[tiling.variant]}")
    return module.launch(call, tiling)
