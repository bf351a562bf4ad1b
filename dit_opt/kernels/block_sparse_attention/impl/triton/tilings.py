"""Tile sizes of the Triton kernel, chosen from a table that was compiled and linted, not tuned.

Every entry compiles without register spills on its architecture (see `dit_opt.kernels.aot`), so no
user waits for an autotuner and no cache has to be shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

VARIANTS = ("plain", "gluon", "specialised")


@dataclass(frozen=True)
class Tiling:
    """One program's tile of `tile_q` queries by `tile_k` keys, and how it is compiled.

    Attributes:
        variant: the kernel that computes it. "plain" is the one that everything takes; "gluon" and
            "specialised" give warps roles of their own, see `experimental`.

    Raises ValueError for a variant of another name.
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    variant: str = "plain"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"There is no variant {self.variant!r} of block-sparse attention; take one of "
                f"{', '.join(VARIANTS)}."
            )


# (padded head dimension, bytes per element) -> the largest tiling that fits. A tiling is cut down
# to the block sizes of the call. Three stages prefetch the block index beside double-buffered keys.
_NVIDIA: dict[tuple[int, int], Tiling] = {
    (32, 2): Tiling(128, 64, 8, 3),
    (64, 2): Tiling(128, 64, 8, 3),
    (128, 2): Tiling(128, 64, 8, 3),
    (256, 2): Tiling(64, 32, 4, 2),
    (32, 4): Tiling(64, 32, 4, 2),
    (64, 4): Tiling(64, 32, 8, 2),
    (128, 4): Tiling(32, 16, 8, 2),
    (256, 4): Tiling(32, 16, 8, 1),
}


_AMD: dict[tuple[int, int], Tiling] = {
    (32, 2): Tiling(128, 64, 4, 2),
    (64, 2): Tiling(128, 64, 4, 2),
    (128, 2): Tiling(128, 64, 8, 1),
    (256, 2): Tiling(64, 32, 8, 1),
    (32, 4): Tiling(64, 32, 4, 1),
    (64, 4): Tiling(64, 32, 4, 1),
    (128, 4): Tiling(64, 32, 8, 1),
    (256, 4): Tiling(32, 16, 8, 1),
}


def choose_tiling(
    architecture: str,
    padded_dim: int,
    itemsize: int,
    block_q: int,
    block_k: int,
    aligned: bool = True,
    tail: bool = False,
) -> Tiling:
    """The tiling for an architecture ("sm_90", "gfx942"), a head dimension and a dtype's size.

    `padded_dim` comes from `pad_dim`; tiles never exceed the blocks that a plan lists. Tensors
    that are not aligned to 16 bytes are loaded through more registers, so their tiles are smaller.
    With a tail, what is loaded through pointers is prefetched one stage less, or it would spill.
    """
    table = _AMD if is_amd(architecture) else _NVIDIA
    largest = table[padded_dim, itemsize]
    tile_q = min(largest.tile_q, block_q)
    warps = max(1, largest.num_warps * tile_q // largest.tile_q)
    tile_k = largest.tile_k if aligned or padded_dim < 128 else max(16, largest.tile_k // 2)
    stages = largest.num_stages
    if tail and not (aligned and takes_descriptors(architecture, itemsize)):
        stages = min(stages, 2)
    return Tiling(tile_q, min(tile_k, block_k), warps, stages)


def choose_tail_tile(tiling: Tiling, padded_dim: int, use_descriptors: bool) -> int:
    """Centroids per step of the tail.

    Loads through masked pointers take registers that descriptors do not, and so do the widest
    heads; whole tiles would spill there. The tail is a small part of the work.
    """
    whole = use_descriptors and padded_dim < 256
    return tiling.tile_k if whole else max(16, tiling.tile_k // 2)


def pad_dim(dim: int) -> int:
    """The head dimension as the kernel holds it: 32, 64, 128 or 256."""
    return max(32, 1 << (dim - 1).bit_length())


def choose_precision(architecture: str, padded_dim: int, itemsize: int) -> str:
    """How `tl.dot` multiplies: float32 through three TF32 products where they exist and fit."""
    exact = itemsize == 2 or padded_dim > 128 or is_amd(architecture)
    return "ieee" if exact else "tf32x3"


def is_amd(architecture: str) -> bool:
    """Whether an architecture name is one of AMD's."""
    return architecture.startswith("gfx")


def takes_descriptors(architecture: str, itemsize: int) -> bool:
    """Whether tiles are loaded by the tensor memory accelerator (Hopper and later).

    float32 tiles are not: split into TF32 parts they pass through registers anyway, and the
    descriptor's layout makes them spill.
    """
    if is_amd(architecture) or itemsize != 2:
        return False
    return int(architecture.removeprefix("sm_")) >= 90


def is_aligned(x: Tensor) -> bool:
    """Whether every row of a tensor is contiguous and starts on a multiple of 16 bytes."""
    unit = x.element_size()
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * unit % 16 == 0 for stride in x.stride()[:-1])
    )
