"""Block lists as the slot that most routers keep: one bit for each block, in words."""

from __future__ import annotations

import torch
from torch.fx import Node

from dit_opt.kernels.plan.packing import WORD
from dit_opt.program.slots import Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, SiteWriter


def write_words(site: SiteWriter, counts: Node, indices: Node) -> Node:
    """The lists in bits, int32 `[B, H, blocks of queries, words]`."""
    return site.emit.call(
        torch.ops.ditopt.pack_plan_v1.default, counts, indices, site.length, BLOCK_K
    )


def read_words(site: SiteWriter, slot: Slot) -> Node:
    """The words that an earlier call wrote."""
    return site.read(slot, [BLOCK_Q, BLOCK_K * WORD])


def read_lists(site: SiteWriter, slot: Slot) -> tuple[Node, Node, Node]:
    """The words that an earlier call wrote, and the counts and indices in them."""
    words = read_words(site, slot)
    lists = site.emit.call(torch.ops.ditopt.unpack_plan_v1.default, words, site.length, BLOCK_K)
    counts, indices = site.emit.unpack(lists, 2)
    return words, counts, indices
