"""What attention costs, in symbols, and from which length on sparse attention pays.

Dense attention of n tokens takes `F = 4 * B * H * n^2 * D` FLOP at the rate R of the best dense
kernel. A sparse step takes the kept share of them at a part of R, its share of a search, moves of
tokens into the router's order and back, and the launches of more operators:

    dense(n)  = F / R + launch
    sparse(n) = share(n) * F / (efficiency * R) + search(n) / steps + moved(n) / W + launches
    share(n)  = (max(density * n, least_keys) + sparse_keys) / n

By each side of the maximum both are polynomials of degree two, so they meet at the greater of two
roots. Reads of tiles are in the rate: tiles of
128 queries make 128 FLOP of a byte, which the second-level cache of a GPU feeds at R; the accesses
of FlashAttention are `n^2 D^2 / M`, and for block-sparse lists the kept share of that (arXiv
2205.14135). R and W are measured for each device; the other figures hold for its kind.

Sizes are sympy expressions, so nothing here can add a guard to a graph.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import sympy

# What a quality target is taken to keep; reports give the realised figure.
EXPECTED_DENSITY = 0.4

TOKENS = sympy.Symbol("n", integer=True, positive=True)


@dataclass(frozen=True)
class Device:
    """What a device attains.

    Attributes:
        rate: FLOP/s of the fastest dense attention, at long sequences.
        bandwidth: bytes/s, read and written, of moving rows of tokens.
        efficiency: part of `rate` that sparse attention attains on what it keeps.
        search: part of `rate` that searches attain.
        launch: seconds that an operator takes whatever its size.
        sparse_keys: how many more keys than it keeps each query takes the time of.
        sparse_head: seconds that sparse attention takes for each head beside its products.
    """

    rate: float
    bandwidth: float
    efficiency: float
    search: float
    launch: float
    sparse_keys: float = 0.0
    sparse_head: float = 0.0


@dataclass(frozen=True)
class Step:
    """What a sparse step of a site does.

    Attributes:
        density: kept share of the score matrix.
        least_keys: what each query keeps whatever the density.
        pairs: queries times keys that one search scores, in `TOKENS`.
        search_operators, operators: of a search, and of each step beside it.
        steps: that share a search.
        moved: tensors `[B, H, n, D]` that are moved into an order or back.
    """

    density: float
    least_keys: int
    pairs: sympy.Expr
    search_operators: int
    operators: int
    steps: int
    moved: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of one attention call in `TOKENS`: a dense one, and a sparse one, which takes the
    longest of `sparse`.
    """

    dense: sympy.Expr
    sparse: tuple[sympy.Expr, ...]

    def spend(self, tokens: int) -> tuple[float, float]:
        """Seconds of a dense and of a sparse call over so many tokens."""
        dense, *sparse = (float(e.subs(TOKENS, tokens)) for e in (self.dense, *self.sparse))
        return dense, max(sparse)

    def gain(self, tokens: int) -> float:
        """Time of the dense call over that of the sparse one."""
        dense, sparse = self.spend(tokens)
        return dense / sparse

    @functools.cached_property
    def crossover(self) -> int | None:
        """The least number of tokens from which on sparse attention is faster; None if none is."""
        found = 1
        for sparse in self.sparse:
            root = _find_root(self.dense - sparse)
            if root is None:
                return None
            found = max(found, root)
        return found


def dense_flops(
    heads: sympy.Expr, queries: sympy.Expr, keys: sympy.Expr, dim: sympy.Expr
) -> sympy.Expr:
    """Multiply-adds of QK^T and PV, two FLOP each: `4 * (B * H) * Nq * Nk * D`."""
    return 4 * heads * queries * keys * dim


def predict(heads: int, dim: int, itemsize: int, step: Step, device: Device) -> Prediction:
    """Times of self-attention of `TOKENS` tokens with `heads` = B * H heads of `dim`."""
    flops = dense_flops(sympy.Integer(heads), TOKENS, TOKENS, sympy.Integer(dim))
    search = (
        2 * heads * dim * step.pairs / (device.search * device.rate)
        + step.search_operators * device.launch
    )
    # each is read once and written once
    moved = 2 * step.moved * heads * dim * itemsize * TOKENS
    rest = (
        search / step.steps
        + moved / device.bandwidth
        + step.operators * device.launch
        + heads * device.sparse_head
    )
    each = flops / TOKENS / (device.efficiency * device.rate)
    kept = (step.density * TOKENS, sympy.Integer(step.least_keys))
    return Prediction(
        dense=flops / device.rate + device.launch,
        sparse=tuple((keys + device.sparse_keys) * each + rest for keys in kept),
    )


# Of a processor, two cores with AVX2 and the C++ kernels in float32, measured by
# `benchmarks.crossover`: what counts are ratios. Of GPUs, the best dense bfloat16 kernels and
# copies as published, and two to four passes of a search at the rate of exponentials; none is
# measured yet.
_CPU = {
    "efficiency": 0.88,
    "search": 0.62,
    "launch": 3e-6,
    "sparse_keys": 48,
    "sparse_head": 3e-5,
}
_GPU = {"efficiency": 0.75, "search": 0.2, "launch": 6e-6}
# By a part of the name; the first that fits.
DEVICES = {
    "cpu": Device(rate=1.05e11, bandwidth=1.0e10, **_CPU),
    "H200": Device(rate=6.0e14, bandwidth=4.3e12, **_GPU),
    "H100": Device(rate=6.0e14, bandwidth=2.8e12, **_GPU),
    "A100": Device(rate=1.9e14, bandwidth=1.5e12, **_GPU),
    # any other
    "": Device(rate=1.9e14, bandwidth=1.5e12, **_GPU),
}


def find_device(name: str) -> Device:
    """The figures of a device by its name, as "cpu" or "NVIDIA H200"."""
    return next(device for part, device in DEVICES.items() if part in name)


def _find_root(gained: sympy.Expr) -> int | None:
    """The least number of tokens from which on a polynomial of degree two is positive for good;
    None if it never is."""
    terms = sympy.Poly(gained, TOKENS).all_coeffs()
    square, linear, constant = ([0.0] * (3 - len(terms)) + [float(t) for t in terms])[-3:]
    if square <= 0:
        return None
    discriminant = linear**2 - 4 * square * constant
    if discriminant <= 0:
        return 1
    return max(1, math.ceil((-linear + math.sqrt(discriminant)) / (2 * square)))
