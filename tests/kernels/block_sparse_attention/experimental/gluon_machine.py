"""One program's warps on the host, of which chance picks the one that goes on.

Partitions are threads of which one runs at a time. Copies land and matrix products read at any
moment that the hardware may choose, and a buffer that is being written holds NaN. A race shows as
NaN or a wrong value, a deadlock as `Deadlock`. Instructions, layouts and memory fences are not
modelled.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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

    def copy(self, source: Any, place: list[Any], barrier: Barrier, target: Shared) -> None:
        """Start a bulk copy of the tile of a descriptor at a place."""
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
