"""The softmax mass of sampled rows by a C++ kernel."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_opt.kernels.cpp.arguments import count, point
from dit_opt.kernels.cpp.build import load_library
from dit_opt.kernels.scratch import SCRATCH


def can_sample(k: Tensor) -> bool:
    """Whether the library is there and takes such keys."""
    return (
        k.device.type == "cpu"
        and k.dtype == torch.float32
        and k.stride(-1) == 1
        and load_library() is not None
    )


def sample_mass(queries: Tensor, k: Tensor, sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The softmax mass of each row of `queries` in each block, float32 [B, Hk, blocks, rows].

    queries float32 [B, Hk, D, rows], scaled, in units of log2; k [B, Hk, N, D], which `can_sample`.
    `sums`: `gather` and `offsets` of one or two levels of `lay_sums`.
    """
    library = load_library()
    assert library is not None
    batch, heads, dim, rows = queries.shape
    tokens = k.shape[2]
    columns = library.ditopt_count_columns()
    tiles = -(-rows // columns)
    # Rows in tiles, [B, Hk, tiles, D, columns]; the padding of the last one is not used.
    shape = (batch, heads, tiles, dim, columns)
    laid = SCRATCH.take("sampled queries", torch.float32, *shape)
    padded = torch.nn.functional.pad(queries, (0, tiles * columns - rows))
    laid.copy_(padded.unflatten(-1, (tiles, columns)).transpose(2, 3))
    blocks = sums[-1][1].numel()
    # Dtype and device of the keys, not torch's defaults: the kernel writes to an address.
    mass = k.new_empty(batch, heads, blocks, tiles * columns)
    # A level that is not there has no addresses and no sizes.
    tables = [*itertools.chain(*sums), None, None][:4]
    levels = [x for t in tables for x in (point(t), *count(0 if t is None else t.numel()))]
    library.ditopt_sample_mass(
        point(k),
        *count(*k.stride()[:3]),
        point(laid),
        *levels,
        point(mass),
        *count(batch, heads, tokens, dim, tiles, torch.get_num_threads()),
    )
    return mass[..., :rows]
