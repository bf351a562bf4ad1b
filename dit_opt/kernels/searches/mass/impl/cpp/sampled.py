"""The softmax mass of sampled rows by a C++ kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_opt.kernels.cpp.arguments import count, point
from dit_opt.kernels.cpp.build import load_library
from dit_opt.kernels.scratch import SCRATCH

if TYPE_CHECKING:
    from dit_opt.kernels.searches.mass.sampled import Sums


def can_sample(k: Tensor) -> bool:
    """Whether the library is there and takes such keys."""
    return (
        k.device.type == "cpu"
        and k.dtype == torch.float32
        and k.stride(-1) == 1
        and load_library() is not None
    )


def sample_mass(queries: Tensor, k: Tensor, sums: tuple[Sums, ...]) -> Tensor:
    """The softmax mass of each row of `queries` in each block, float32 [B, Hk, blocks, rows].

    queries float32 [B, Hk, D, rows], scaled, in units of log2; k [B, Hk, N, D], which `can_sample`.
    `sums`: one or two levels of `lay_sums`.
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
    blocks = sums[-1].offsets.numel()
    # Dtype and device of the keys, not torch's defaults: the kernel writes to an address.
    mass = k.new_empty(batch, heads, blocks, tiles * columns)
    levels: list[object] = []
    for level in (sums[0], sums[1] if len(sums) > 1 else None):
        if level is None:
            levels += [point(None), *count(0), point(None), *count(0)]
        else:
            levels += [point(level.gather), *count(level.gather.numel())]
            levels += [point(level.offsets), *count(level.offsets.numel())]
    library.ditopt_sample_mass(
        point(k),
        *count(*k.stride()[:3]),
        point(laid),
        *levels,
        point(mass),
        *count(batch, heads, tokens, dim, tiles, torch.get_num_threads()),
    )
    return mass[..., :rows]
