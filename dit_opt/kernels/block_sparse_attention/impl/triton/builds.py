"""Launches of the plain kernel and its helpers, for the linter to compile ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dit_opt.kernels.aot import Build, make_build, make_meta
from dit_opt.kernels.block_sparse_attention.contract import Arguments, ceil_div, new_outputs
from dit_opt.kernels.block_sparse_attention.impl.triton import row_order, tail
from dit_opt.kernels.block_sparse_attention.impl.triton.attention import choose_for_call, prepare
from dit_opt.kernels.block_sparse_attention.impl.triton.candidates import list_candidates
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling, choose_tiling
from dit_opt.kernels.launch import TYPE_NAMES, Launch

# Sizes that Triton specialises for nothing, as most are: the lengths of a plan and the strides of
# its summaries are multiples of 16 for no size of a block.
_BATCH, _HEADS, _KEY_HEADS, _TOKENS = 2, 6, 3, 2301


@dataclass(frozen=True)
class Case:
    """One configuration; `aligned` false is what tensors that fit no descriptor get.

    The tiling is that of the table, unless another one is given.
    """

    dim: int
    dtype: torch.dtype = torch.bfloat16
    block_q: int = 128
    block_k: int = 64
    ragged: bool = True
    bias: bool = False
    aligned: bool = True
    tail: bool = False
    tiling: Tiling | None = None

    def describe(self, tiling: Tiling) -> str:
        """The configuration in words."""
        return (
            f"D={self.dim} {TYPE_NAMES[self.dtype]} block {self.block_q}x{self.block_k} "
            f"tile {tiling.tile_q}x{tiling.tile_k} "
            f"warps {tiling.num_warps} stages {tiling.num_stages}"
            + (" ragged" if self.ragged else "")
            + (" bias" if self.bias else "")
            + ("" if self.aligned else " unaligned")
            + (" tail" if self.tail else "")
        )


def make_call(case: Case) -> Arguments:
    """The call of a case, on meta tensors."""
    keys = _TOKENS if case.ragged else ceil_div(_TOKENS, case.block_k) * case.block_k
    # A row with a spare channel has an odd stride, and without its first one it is off alignment.
    spare = 0 if case.aligned else 1
    q, k, v = (
        make_meta(_BATCH, tokens, heads, case.dim + spare, dtype=case.dtype)[..., spare:]
        for tokens, heads in ((_TOKENS, _HEADS), (keys, _KEY_HEADS), (keys, _KEY_HEADS))
    )
    blocks = ceil_div(keys, case.block_k)
    counts = make_meta(1, _HEADS, ceil_div(_TOKENS, case.block_q), dtype=torch.int32)
    means = lengths = None
    if case.tail:
        means = make_meta(_BATCH, _KEY_HEADS, blocks, case.dim, dtype=case.dtype)
        lengths = make_meta(_BATCH, _HEADS, blocks)
    return Arguments(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        counts,
        make_meta(*counts.shape, blocks, dtype=torch.int32),
        make_meta(1, 1, keys) if case.bias else None,
        case.dim**-0.5,
        case.block_q,
        case.block_k,
        means,
        means,
        lengths,
    )


def build_case(target: str, case: Case) -> Build:
    """The last launch of a case, which attends."""
    call = make_call(case)
    tiling = choose_for_call(call, target) if case.tiling is None else case.tiling
    *_, launch = prepare(call, *new_outputs(call.q), target, tiling)
    return make_build(
        target,
        launch,
        case.describe(tiling),
        expects_wgmma=target == "sm_90" and launch.constexprs["USE_DESCRIPTORS"],
    )


def list_cases(target: str) -> Iterator[Case]:
    """The shipped configurations for one target: every tiling, and every branch of the kernel."""
    fp16, fp32 = torch.float16, torch.float32
    for dim in (32, 64, 128, 256):
        yield Case(dim)
        yield Case(dim, fp32)
        yield Case(dim, fp32, tail=True)
        if dim > 32:
            # of 32 channels the tiling is that of 64
            yield Case(dim, bias=True)
        if dim in (64, 128):
            yield Case(dim, tail=True)
    yield Case(128, block_k=128, ragged=False)
    yield Case(128, block_q=64)
    yield Case(128, aligned=False)
    yield Case(80, fp16)
    yield Case(128, bias=True, tail=True)
    yield Case(256, bias=True, tail=True)
    yield Case(128, block_k=128, tail=True)
    yield Case(128, aligned=False, tail=True)
    for dim, block_k in itertools.product((64, 128), (64, 128)):
        usual = choose_tiling(target, dim, 2, 128, block_k)
        for tiling in list_candidates(target, dim, 2, 128, block_k):
            if tiling != usual:
                yield Case(dim, block_k=block_k, tiling=tiling)


def list_builds(target: str) -> Iterator[Build]:
    """Every kernel that one target needs: for each case, and those that prepare the lists."""
    for case in list_cases(target):
        yield build_case(target, case)
    order, words = _prepare_lists(target)
    yield make_build(target, order, f"order rows tile {row_order.TILE} chunk {row_order.CHUNK}")
    yield make_build(target, words, f"pack lists words {tail.WORDS} chunk {tail.CHUNK}")


def _prepare_lists(target: str) -> list[Launch]:
    """The launches before the one that attends with a tail."""
    call = make_call(Case(128, tail=True))
    return prepare(call, *new_outputs(call.q), target, choose_for_call(call, target))[:-1]
