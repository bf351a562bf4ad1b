"""Tile sizes that fit into a multiprocessor of a Hopper GPU, found by enumeration.

For tiles that are loaded by descriptors, the resources of a program follow from their sizes: the
machine code uses exactly the estimated shared memory, and between the estimated registers and that
plus the spare ones (Triton 3.6.0 and 3.7.1). Which candidate is fastest is measured, see `tuning`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling, takes_descriptors

MOST, MOST_OF_A_SHAPE = 5, 2
_REGISTERS = 65536
_REGISTERS_PER_THREAD = 255
_SHARED_PER_PROGRAM = 227 * 1024
_SHARED = 228 * 1024
# Rows of the smallest tensor product of one warp.
_ROWS_PER_WARP = 16
# Addresses, row sums and loop counters of a thread.
_FIXED_REGISTERS = 26
# Addresses that the compiler may hold beyond need.
_SPARE_REGISTERS = 6
# Barriers beside the tiles.
_FIXED_SHARED = 64
# The listed index is one stage of the pipeline: three stages hold two pairs of key and value tiles
# and prefetch the index, five hold three pairs. Two would wait for the index.
_PAIRS = {3: 2, 5: 3}
_TILES_Q, _TILES_K, _WARPS = (64, 128), (32, 64, 128), (4, 8)


@dataclass(frozen=True)
class Demand:
    """The resources of one program.

    Attributes:
        registers: of each thread, at least.
        shared: bytes of shared memory.
        spare_registers: how many more each thread may use.
    """

    registers: int
    shared: int
    spare_registers: int = 0

    def occupancy(self, warps: int) -> int:
        """Programs that a multiprocessor holds at once."""
        # registers are handed out in units of 8
        threads = 32 * warps * ceil_div(self.registers, 8) * 8
        return min(_REGISTERS // threads, _SHARED // (self.shared + 1024))


def estimate_demand(tiling: Tiling, padded_dim: int) -> Demand:
    """The resources of a program whose 16-bit tiles are loaded by descriptors.

    Registers hold the output and the scores in float32, and the weights in 16 bits, once or, where
    the compiler copies them for the product, twice; shared memory the queries and the buffered keys
    and values.
    """
    threads = 32 * tiling.num_warps
    weights = tiling.tile_q * tiling.tile_k // 2
    held = tiling.tile_q * (padded_dim + tiling.tile_k) + weights
    pairs = _PAIRS[tiling.num_stages]
    rows = tiling.tile_q + 2 * pairs * tiling.tile_k
    return Demand(
        registers=ceil_div(held, threads) + _FIXED_REGISTERS,
        shared=2 * padded_dim * rows + _FIXED_SHARED,
        spare_registers=ceil_div(weights, threads) + _SPARE_REGISTERS,
    )


def list_candidates(
    architecture: str, padded_dim: int, itemsize: int, block_q: int, block_k: int
) -> list[Tiling]:
    """At most `MOST` tilings for 16-bit tensors on Hopper, the most promising first.

    The largest products of a step come first, and of a shape the one that keeps most warps in
    flight; no shape comes more than twice. Other architectures and dtypes have no candidates.
    """
    if architecture != "sm_90" or not takes_descriptors(architecture, itemsize):
        return []
    fitting: list[tuple[int, int, int, Tiling]] = []
    for tile_q, tile_k, warps, stages in itertools.product(_TILES_Q, _TILES_K, _WARPS, _PAIRS):
        tiling = Tiling(tile_q, tile_k, warps, stages)
        demand = estimate_demand(tiling, padded_dim)
        fits = (
            block_q % tile_q == 0
            and block_k % tile_k == 0
            and tile_q % (_ROWS_PER_WARP * warps) == 0
            and demand.registers + demand.spare_registers <= _REGISTERS_PER_THREAD
            and demand.shared <= _SHARED_PER_PROGRAM
        )
        if fits:
            in_flight = warps * demand.occupancy(warps)
            fitting.append((-tile_q * tile_k, -in_flight, stages, tiling))
    found: list[Tiling] = []
    for *_, tiling in sorted(fitting, key=lambda entry: entry[:3]):
        shape = (tiling.tile_q, tiling.tile_k)
        if sum((t.tile_q, t.tile_k) == shape for t in found) < MOST_OF_A_SHAPE:
            found.append(tiling)
    return found[:MOST]


def list_variants(
    architecture: str, padded_dim: int, itemsize: int, block_q: int, block_k: int
) -> list[Tiling]:
    """Tilings of other kernels than the plain one, which nothing takes before it was measured.

    They fit Hopper and the sizes that `variants.fits` accepts. Their twelve warps take all
    registers of a multiprocessor, so that one program runs there and can use all shared memory.
    """
    known = (block_q, padded_dim in (64, 128), block_k in (64, 128))
    if architecture != "sm_90" or itemsize != 2 or known != (128, True, True):
        return []
    # narrow blocks come faster, and take no more memory with one more of them
    stages = 3 if block_k == 64 else 2
    return [
        Tiling(block_q, block_k, 4, stages, "gluon"),
        Tiling(block_q, block_k, 4, 2, "specialised"),
    ]
