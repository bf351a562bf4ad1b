"""The arguments that all kernels of block-sparse attention have in common, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import Arguments
from dit_opt.kernels.scores import LOG2_E


def make_contiguous(call: Arguments) -> Arguments:
    """The same call with all tensors but q, k and v in contiguous memory, as kernels read them."""
    names = ("counts", "indices", "key_bias", "centroids", "values", "log_lengths")
    given = {name: getattr(call, name) for name in names}
    return dataclasses.replace(
        call, **{name: x.contiguous() for name, x in given.items() if x is not None}
    )


def name_plan(call: Arguments, order: Tensor) -> dict[str, Any]:
    """The lists, the order of their rows, and the sizes of a call of `make_contiguous`."""
    heads = call.q.shape[1]
    return {
        "p_counts": call.counts,
        "p_indices": call.indices,
        "p_order": order,
        "scale_log2": call.scale * LOG2_E,
        "num_queries": call.q.shape[2],
        "num_keys": call.k.shape[2],
        "num_heads": heads,
        "group": heads // call.k.shape[1],
        "plan_heads": call.counts.shape[0] * heads,
        "query_blocks": call.counts.shape[2],
        "capacity": call.indices.shape[3],
    }


def name_broadcast_strides(tensor: str, x: Tensor | None) -> dict[str, int]:
    """Strides of the first two axes, [B or 1, H or 1, ...]; 0 repeats an axis of size 1."""
    if x is None:
        return {f"stride_{tensor}_b": 0, f"stride_{tensor}_h": 0}
    batch, heads = (0 if x.shape[axis] == 1 else x.stride(axis) for axis in range(2))
    return {f"stride_{tensor}_b": batch, f"stride_{tensor}_h": heads}
