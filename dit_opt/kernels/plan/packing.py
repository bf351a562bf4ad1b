"""Plans as they are kept between calls: one bit for each block.

Attention of 24 heads over 115k tokens has 39 million blocks: 156 MB as lists, 5 MB as bits, for
each layer and guidance branch. A call that reuses a plan unpacks its lists again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.block_sparse_attention.reference import expand_lists
from dit_opt.kernels.plan.impl.cpp.lists import pack_lists, unpack_lists
from dit_opt.kernels.plan.plan import list_kept

# Bits of a word; the passes size their state by it.
WORD = 32

_library = torch.library.Library("ditopt", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define(
    "pack_plan_v1(Tensor counts, Tensor indices, SymInt N, int block_k) -> Tensor", tags=_TAGS
)
_library.define(
    "unpack_plan_v1(Tensor words, SymInt N, int block_k) -> (Tensor counts, Tensor indices)",
    tags=_TAGS,
)


def pack_plan(counts: Tensor, indices: Tensor, tokens: int, block_k: int) -> Tensor:
    """Lists over the blocks of `tokens` keys as int32 words `[..., nq, ceil(nk / 32)]`.

    Bit j % 32 of word j // 32 stands for block j. `counts` int32 `[..., nq]`, `indices` int32
    `[..., nq, length]` with any length that holds the counts.
    """
    blocks = ceil_div(tokens, block_k)
    found = pack_lists(counts, indices, blocks) if counts.device.type == "cpu" else None
    if found is not None:
        return found
    kept = expand_lists(counts, indices, blocks)
    kept = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % WORD))
    bits = kept.unflatten(-1, (-1, WORD)).int() << _list_shifts(counts.device)
    # All bits of a word differ, so their sum never carries, not even into the sign.
    return bits.sum(-1, dtype=torch.int32)


def unpack_plan(words: Tensor, tokens: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Counts int32 `[..., nq]` and ascending lists int32 `[..., nq, nk]` of packed words."""
    blocks = ceil_div(tokens, block_k)
    found = unpack_lists(words, blocks) if words.device.type == "cpu" else None
    if found is not None:
        return found
    bits = (words.unsqueeze(-1) >> _list_shifts(words.device)) & 1
    return list_kept(bits.flatten(-2)[..., :blocks].bool())


def _list_shifts(device: torch.device) -> Tensor:
    return torch.arange(WORD, dtype=torch.int32, device=device)


_library.impl("pack_plan_v1", pack_plan, "CompositeExplicitAutograd")
_library.impl("unpack_plan_v1", unpack_plan, "CompositeExplicitAutograd")


@torch.library.impl(_library, "pack_plan_v1", "CUDA")
def _pack_on_gpu(counts: Tensor, indices: Tensor, tokens: int, block_k: int) -> Tensor:
    # Imported here because Triton is absent where there is no GPU to run it on.
    from dit_opt.kernels.block_sparse_attention.impl.triton.tail import pack_lists

    return pack_lists(counts.contiguous(), indices.contiguous(), ceil_div(tokens, block_k))


@torch.library.impl(_library, "unpack_plan_v1", "CUDA")
def _unpack_on_gpu(words: Tensor, tokens: int, block_k: int) -> tuple[Tensor, Tensor]:
    from dit_opt.kernels.plan.impl.triton import lists as triton_lists

    return triton_lists.unpack_plan(words, tokens, block_k)


@torch.library.register_fake("ditopt::pack_plan_v1", lib=_library)
def _fake_pack(counts, indices, N, block_k):
    return counts.new_empty((*counts.shape, ceil_div(ceil_div(N, block_k), WORD)))


@torch.library.register_fake("ditopt::unpack_plan_v1", lib=_library)
def _fake_unpack(words, N, block_k):
    shape = words.shape[:-1]
    return words.new_empty(shape), words.new_empty((*shape, ceil_div(N, block_k)))
