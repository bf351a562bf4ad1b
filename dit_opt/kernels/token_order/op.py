"""Registers the ops that make token orders and move tokens, for CPUs and GPUs, with their fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.token_order import reference
from dit_opt.kernels.token_order.cube_order import make_cube_order

# The version is part of a name because the fake's body is in no compile cache key.
_lib = torch.library.Library("ditopt", "FRAGMENT")
_lib.define("gather_tokens_v1(Tensor x, Tensor rows) -> Tensor")
_lib.define("scatter_tokens_v1(Tensor x, Tensor inverse) -> Tensor")
_lib.define("gather_bias_v1(Tensor bias, Tensor rows) -> Tensor")
_lib.define(
    "cube_order_v1(Tensor like, SymInt T, SymInt H, SymInt W, SymInt video_start, SymInt N) "
    "-> (Tensor rows, Tensor inverse)"
)


def _fake_gather(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty((*rows.shape, x.shape[-1]))


def _fake_scatter(x: Tensor, inverse: Tensor) -> Tensor:
    batch, heads, count, dim = x.shape
    return x.new_empty((batch, count, heads, dim)).transpose(1, 2)


def _fake_bias(bias: Tensor, rows: Tensor) -> Tensor:
    return bias.new_empty(rows.shape)


def _fake_order(
    like: Tensor, T: int, H: int, W: int, video_start: int, N: int
) -> tuple[Tensor, Tensor]:
    return like.new_empty(N, dtype=torch.int64), like.new_empty(N, dtype=torch.int64)


for _name, _real, _fake in (
    ("gather_tokens_v1", reference.gather_tokens, _fake_gather),
    ("scatter_tokens_v1", reference.scatter_tokens, _fake_scatter),
    ("gather_bias_v1", reference.gather_bias, _fake_bias),
    ("cube_order_v1", make_cube_order, _fake_order),
):
    _lib.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditopt::{_name}", _fake, lib=_lib)


@torch.library.impl(_lib, "gather_tokens_v1", "CUDA")
def _gather_on_gpu(x: Tensor, rows: Tensor) -> Tensor:
    # Imported here because Triton is absent where there is no GPU to run it on.
    from dit_opt.kernels.token_order.impl.triton import gather

    return gather.gather_tokens(x, rows)


@torch.library.impl(_lib, "scatter_tokens_v1", "CUDA")
def _scatter_on_gpu(x: Tensor, inverse: Tensor) -> Tensor:
    from dit_opt.kernels.token_order.impl.triton import gather

    return gather.scatter_tokens(x, inverse)
