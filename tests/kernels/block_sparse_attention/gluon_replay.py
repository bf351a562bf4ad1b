"""Runs the Gluon kernel's own source on the host, its warps in every order that chance gives.

Triton has no interpreter for Gluon, so its language is stood in for here: partitions are threads of
which one runs at a time, copies land and matrix products read at any moment that the hardware may
choose, and a buffer that is being written holds NaN. A race shows as NaN or a wrong value, a
deadlock as `Deadlock`. Instructions, layouts and memory fences are not modelled.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention import gluon, gluon_warps


class Deadlock(AssertionError):
    """Every partition waits, and no copy is under way."""


class Barrier:
    """A barrier in shared memory: arrivals and bytes that the present phase still waits for."""

    def init(self, count: int) -> None:
        self.count = self.arrivals = count
        self.missing, self.phases = 0, 0

    def advance(self, arrivals: int, missing: int) -> None:
        self.arrivals -= arrivals
        self.missing += missing
        assert self.arrivals >= 0 and self.missing >= 0
        if self.arrivals == self.missing == 0:
            self.phases += 1
            self.arrivals = self.count

    def has_completed(self, parity: int) -> bool:
        return self.phases & 1 != int(parity)


class Shared:
    """Tiles in shared memory; views see what is written later."""

    def __init__(self, data: Tensor):
        self.data = data
        self.dtype = data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))


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


@dataclass
class Product:
    """A matrix product that may read its operands at any moment until it is waited for."""

    a: Any
    b: Shared
    acc: Any
    result: Tensor | None = None

    def run(self) -> None:
        if self.result is None:
            a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
            product = a.float() @ b.float()
            self.result = product if self.acc is None else product + self.acc


@dataclass
class Partition:
    """Warps that run one function, until they wait or give way."""

    function: Callable[..., None]
    arguments: tuple
    is_ready: Callable[[], bool] = lambda: True
    products: list[Product] = field(default_factory=list)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: bool = False
    error: BaseException | None = None


class Machine:
    """One program's partitions, of which chance picks the one that goes on."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.back = threading.Semaphore(0)
        self.current: Partition | None = None

    def specialize(self, functions: list[tuple], *_: Any) -> None:
        partitions = [Partition(function, arguments) for function, arguments in functions]
        for partition in partitions:
            threading.Thread(target=self._live, args=(partition,), daemon=True).start()
        while not all(p.done for p in partitions) or self.copies:
            moves: list[Any] = [p for p in partitions if not p.done and p.is_ready()]
            moves += self.copies
            if not moves:
                raise Deadlock([p.function.__name__ for p in partitions if not p.done])
            move = self.random.choice(moves)
            if not isinstance(move, Partition):
                self.copies.remove(move)
                move()
                continue
            self.current = move
            move.turn.release()
            self.back.acquire()
            if move.error is not None:
                raise move.error

    def _live(self, partition: Partition) -> None:
        partition.turn.acquire()
        try:
            partition.function(*partition.arguments)
        except BaseException as error:
            partition.error = error
        partition.done = True
        self.back.release()

    def give_way(self, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until chance comes back here while `is_ready`."""
        partition = self.current
        assert partition is not None
        partition.is_ready = is_ready
        self.back.release()
        partition.turn.acquire()

    def copy(self, source: Descriptor, place: list[Any], barrier: Barrier, target: Shared) -> None:
        tile = source.read(place)
        target.data.fill_(torch.nan)

        def land() -> None:
            target.data.copy_(tile)
            barrier.advance(0, -source.block_type.nbytes)

        self.copies.append(land)
        self.give_way()

    def multiply(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, **_: Any) -> Product:
        assert self.current is not None
        product = Product(a, b, acc if use_acc else None)
        self.current.products.append(product)
        if self.random.random() < 0.5:
            product.run()
        self.give_way()
        return product

    def await_products(self, outstanding: int, deps: tuple) -> Any:
        self.give_way()
        assert self.current is not None
        products = self.current.products
        while len(products) > outstanding:
            products.pop(0).run()
        assert not any(d in products for d in deps if isinstance(d, Product)), "used too early"
        values = tuple(d.result if isinstance(d, Product) else d for d in deps)
        return values if len(values) > 1 else values[0]

    def arrive(self, barrier: Barrier, count: int) -> None:
        barrier.advance(count, 0)
        self.give_way()


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
    """Stands in for the compiled kernel: `Replay(monkeypatch, seed)[grid](*arguments)`.

    `changes` overrides names of the kernel's modules, to see whether a fault is noticed.
    """

    monkeypatch: Any
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, **constants: Any) -> None:
            adapted = [_adapt(x) for x in arguments]
            for i in range(grid[0] * grid[1]):
                names = make_language(Machine(self.seed + i), (i % grid[0], i // grid[0]))
                for name, value in (names | FUNCTIONS | self.changes).items():
                    for module in (gluon, gluon_warps):
                        self.monkeypatch.setattr(module, name, value, raising=False)
                KERNEL(*adapted, **constants)

        return run


# The sources, taken before a test puts something else in their place.
KERNEL = gluon.block_sparse_attention_gluon_kernel.fn
FUNCTIONS = {
    name: getattr(gluon_warps, name).fn for name in ("locate", "copy_tiles", "weigh", "attend")
}


def _adapt(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        # the whole memory, whatever the view
        size = argument.untyped_storage().nbytes() // argument.element_size()
        return Pointer(argument.as_strided((size,), (1,), 0), argument.storage_offset())
    if hasattr(argument, "block_shape"):
        return Descriptor(argument)
    return torch.tensor(argument)
