"""What searches share: the plan that they return and the blocks that they choose from."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.contract import ceil_div
from dit_opt.kernels.plan.impl.cpp import lists as cpp


@dataclass(frozen=True, eq=False)
class Plan:
    """The key blocks that each query block keeps, for B items and H heads of one layer.

    `counts` int32 [B, H, nq]; `indices` int32 [B, H, nq, nk], ascending in the first `counts`
    entries and zero after them. `recall` float32 [B, H]: the share of softmax mass that the lists
    keep, over the query blocks that are not dense by rule; NaN where a search does not know it.
    `density` float32 [B, H]: the kept share of the score matrix, in real tokens, over all rows.

    A plan that all items share has B = 1. The lists take 4 * B * H * nq * nk bytes.
    """

    counts: Tensor
    indices: Tensor
    recall: Tensor
    density: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields in the order in which operators return them."""
        return self.counts, self.indices, self.recall, self.density


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The blocks of one self-attention over `tokens` tokens, on a device.

    `query_sizes` float32 [nq], `key_sizes` float32 [nk]: real tokens in each block.
    `always_kept` bool [nq, nk]: what every plan keeps, whatever its mass: blocks with text keys,
    all blocks of a query block with text, and the blocks that hold the queries' own tokens.
    """

    tokens: int
    block_q: int
    block_k: int
    query_sizes: Tensor
    key_sizes: Tensor
    always_kept: Tensor


@functools.lru_cache(maxsize=8)
def lay_blocks(
    tokens: int,
    video_start: int,
    video_tokens: int,
    block_q: int,
    block_k: int,
    device: torch.device,
) -> BlockLayout:
    """The blocks of a sequence whose video is at [video_start, video_start + video_tokens).

    Positions are those in the queries and keys that are searched: behind a token order the video
    starts at 0. All other tokens are text. Cached. Raises ValueError when the video does not fit
    into the sequence or a block is empty.
    """
    if min(block_q, block_k) < 1:
        raise ValueError(f"Blocks of {block_q} x {block_k} tokens are empty; use 1 or more.")
    end = video_start + video_tokens
    if not 0 <= video_start <= end <= tokens:
        raise ValueError(
            f"A video of {video_tokens} tokens from token {video_start} on does not fit into a "
            f"sequence of {tokens}; give its position in the order of the queries and keys."
        )
    text = torch.ones(tokens, dtype=torch.bool)
    text[video_start:end] = False
    first_q, first_k = (torch.arange(0, tokens, block) for block in (block_q, block_k))
    last_q, last_k = (first_q + block_q).clamp(max=tokens), (first_k + block_k).clamp(max=tokens)
    own = (first_k < last_q[:, None]) & (first_q[:, None] < last_k)
    text_before = torch.cat([torch.zeros(1, dtype=torch.int64), text.cumsum(0)])
    text_q = text_before[last_q] > text_before[first_q]
    text_k = text_before[last_k] > text_before[first_k]
    kept = own | text_q[:, None] | text_k
    return BlockLayout(
        tokens=tokens,
        block_q=block_q,
        block_k=block_k,
        query_sizes=(last_q - first_q).float().to(device),
        key_sizes=(last_k - first_k).float().to(device),
        always_kept=kept.to(device),
    )


def check_request(q: Tensor, k: Tensor, blocks: BlockLayout) -> None:
    """Raise ValueError when queries [B, H, N, D] or keys do not fit the blocks."""
    if q.shape[2] != blocks.tokens or k.shape[2] != blocks.tokens:
        raise ValueError(
            f"The search plans self-attention over {blocks.tokens} tokens, but got {q.shape[2]} "
            f"queries and {k.shape[2]} keys; leave cross-attention dense."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly.")


def list_kept(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A block mask bool [..., nq, nk] as counts int32 [..., nq] and indices int32 [..., nq, nk].

    Indices are ascending in the first `counts` entries and zero after them.
    """
    if mask.is_cuda:
        # Imported here because Triton is absent where there is no GPU to run it on.
        from dit_opt.kernels.plan.impl.triton import lists as triton_lists

        return triton_lists.list_kept(mask)
    if mask.device.type == "cpu":
        found = cpp.list_blocks(mask)
        if found is not None:
            return found
    key_blocks = mask.shape[-1]
    position = mask.cumsum(-1, dtype=torch.int32)
    # What is not kept goes to one more slot, which is cut off.
    slots = torch.where(mask, position - 1, key_blocks).long()
    blocks = torch.arange(key_blocks, dtype=torch.int32, device=mask.device)
    indices = blocks.new_zeros(*mask.shape[:-1], key_blocks + 1)
    indices.scatter_(-1, slots, blocks.expand_as(slots))
    return position[..., -1].contiguous(), indices[..., :-1].contiguous()


def new_plan(
    q: Tensor, k: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised tensors with the shapes of a plan, for the fakes of searches."""
    batch, heads, queries, _ = q.shape
    rows = (batch, heads, ceil_div(queries, block_q))
    return (
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty((*rows, ceil_div(k.shape[2], block_k)), dtype=torch.int32),
        q.new_empty((batch, heads), dtype=torch.float32),
        q.new_empty((batch, heads), dtype=torch.float32),
    )
