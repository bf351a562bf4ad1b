"""Runs the Gluon kernel's own source on the host, its warps in every order that chance gives.

Triton has no interpreter for Gluon, so its language is stood in for here: by PyTorch's functions,
and by `gluon_machine` for what happens at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.experimental import gluon, gluon_warps

from .gluon_machine import Barrier, Machine, Shared


@dataclass
class Pointer:
    """Addresses in the memory of one tensor."""

    data: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset - offset)


class Descriptor:
    """A Triton descriptor as the device sees it."""

    def __init__(self, host: Any):
        self.host, self.dtype, self.layout = host, host.base.dtype, host.layout
        nbytes = math.prod(host.block_shape) * host.base.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes, shape=host.block_shape)

    def read(self, place: list[Any]) -> Tensor:
        """A tile, zero outside the tensor."""
        tile = torch.zeros(self.host.block_shape, dtype=self.dtype)
        source = self.host.base.as_strided(self.host.shape, self.host.strides)
        box = [slice(int(p), int(p) + b) for p, b in zip(place, tile.shape, strict=True)]
        found = source[tuple(box)]
        tile[tuple(slice(size) for size in found.shape)] = found
        return tile


def _load(pointer: Pointer, mask: Any = True, other: Any = None) -> Tensor:
    return pointer.data[int(pointer.offset)] if mask else torch.tensor(other)


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    mask = mask.expand(values.shape)
    pointer.data[pointer.offset.expand(values.shape)[mask].long()] = values[mask]


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)])
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def make_language(machine: Machine, program: tuple[int, int]) -> dict[str, Any]:
    """The names that the kernel's modules import from Gluon."""
    language = SimpleNamespace(
        int64=torch.int64,
        float32=torch.float32,
        program_id=lambda axis: torch.tensor(program[axis]),
        load=_load,
        store=_store,
        allocate_shared_memory=_allocate,
        warp_specialize=machine.specialize,
        static_range=range,
        arange=lambda first, end, layout: torch.arange(first, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        where=lambda mask, a, b: torch.where(torch.as_tensor(mask), a, b),
        maximum=torch.maximum,
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        expand_dims=lambda x, axis: x.unsqueeze(axis),
        convert_layout=lambda x, layout: x,
        SliceLayout=lambda *_: None,
        NVMMADistributedLayout=lambda *_: None,
        DotOperandLayout=lambda *_: None,
    )
    barriers = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, nbytes: barrier.advance(1, nbytes),
        arrive=machine.arrive,
        wait=lambda barrier, parity: machine.give_way(lambda: barrier.has_completed(parity)),
    )
    return {
        "gl": language,
        "mbarrier": barriers,
        "tma": SimpleNamespace(async_copy_global_to_shared=machine.copy),
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_wait": machine.await_products,
        "fence_async_shared": lambda: None,
    }


@dataclass(frozen=True)
class Replay:
    """Stands in for the compiled kernel: `Replay(monkeypatch, seed)[grid](**arguments)`.

    `changes` overrides names of the kernel's modules, to see whether a fault is noticed.
    """

    monkeypatch: Any
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def run(num_warps: int, **arguments: Any) -> None:
            # Constants are written in capitals.
            adapted = {n: x if n.isupper() else _adapt(x) for n, x in arguments.items()}
            for i in range(grid[0] * grid[1]):
                names = make_language(Machine(self.seed + i), (i % grid[0], i // grid[0]))
                for name, value in (names | FUNCTIONS | self.changes).items():
                    for module in (gluon, gluon_warps):
                        self.monkeypatch.setattr(module, name, value, raising=False)
                KERNEL(**adapted)

        return run


# The sources, taken before a test puts something else in their place.
KERNEL = gluon.block_sparse_attention_gluon_kernel.fn
FUNCTIONS = {
    name: getattr(gluon_warps, name).fn for name in ("locate", "copy_tiles", "weigh", "attend_rows")
}


def _adapt(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        # the whole memory, whatever the view
        size = argument.untyped_storage().nbytes() // argument.element_size()
        return Pointer(argument.as_strided((size,), (1,), 0), argument.storage_offset())
    if hasattr(argument, "block_shape"):
        return Descriptor(argument)
    return torch.tensor(argument)
