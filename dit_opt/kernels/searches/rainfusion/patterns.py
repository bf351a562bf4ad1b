"""RainFusion's attention patterns, between tokens and between blocks of tokens.

A pattern is one predicate on boxes in (t, h, w). A token is a box of size one, so one rule serves
tokens and blocks, and a block list is a superset of its pattern by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_opt.kernels.plan.orders import (
    LATTICE_STEPS,
    VideoLayout,
    locate_tokens,
    measure_lattice,
)

# Kept shares that set the bandwidths, narrow to wide.
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)


class HeadKind(Enum):
    """What a head attends to."""

    SPATIAL = "spatial"
    TEMPORAL = "temporal"
    TEXTURAL = "textural"
    DENSE = "dense"


@dataclass(frozen=True)
class Boxes:
    """Bounding boxes of n groups of tokens.

    `low`, `high` int64 [n, 3]: smallest and largest (t, h, w) of the group's video tokens.
    `level` int64 [n]: the largest step of a checkerboard that holds one of them. `has_text`
    bool [n]: whether any token of the group is outside the video.
    """

    low: Tensor
    high: Tensor
    level: Tensor
    has_text: Tensor

    def take(self, count: int) -> Boxes:
        """At most `count` of the boxes, evenly spread."""
        step = -(-len(self.level) // count)
        fields = (self.low, self.high, self.level, self.has_text)
        return Boxes(*(values[::step] for values in fields))


@dataclass(frozen=True)
class Pattern:
    """Which keys a query keeps: those within `reach` and on the checkerboard `lattice`.

    `reach` is (dt, dh, dw), None meaning any distance; `lattice` is a step, 1 meaning every token.
    Source: RainFusion, arXiv 2505.21036.
    """

    kind: HeadKind
    reach: tuple[int | None, int | None, int | None] = (None, None, None)
    lattice: int = 1

    @property
    def name(self) -> str:
        """The kind and its bandwidth: "spatial 2", "temporal 2x3", "textural 4", "dense"."""
        bands = [str(reach) for reach in self.reach if reach is not None]
        if self.kind is HeadKind.TEXTURAL:
            bands = [str(self.lattice)]
        return " ".join([self.kind.value, "x".join(bands)]).rstrip()

    def lift(self, queries: Boxes, keys: Boxes) -> Tensor:
        """Which of the key boxes each query box keeps, bool [queries, keys].

        Boxes with text are kept by all, and keep all.
        """
        kept = (keys.level >= self.lattice).expand(len(queries.level), -1)
        for axis, reach in enumerate(self.reach):
            if reach is None:
                continue
            after = keys.low[None, :, axis] - queries.high[:, None, axis]
            before = queries.low[:, None, axis] - keys.high[None, :, axis]
            kept = kept & (after <= reach) & (before <= reach)
        return kept | queries.has_text[:, None] | keys.has_text[None, :]


DENSE = Pattern(HeadKind.DENSE)


def list_patterns(layout: VideoLayout) -> tuple[Pattern, ...]:
    """Every pattern with every bandwidth worth trying on this grid, without the dense one.

    A temporal band of share s reaches s / 2 of the frames either way; a window reaches sqrt(s) / 2
    of the height and of the width either way. What covers the whole extent is left out.
    """
    found = [*_list_spatial(layout), *_list_temporal(layout)]
    found += [Pattern(HeadKind.TEXTURAL, lattice=step) for step in LATTICE_STEPS if step > 1]
    return tuple(dict.fromkeys(found))


def box_blocks(layout: VideoLayout, order: Tensor, block: int) -> Boxes:
    """The bounding boxes of the ceil(N / block) consecutive blocks of an order int64 [N]."""
    positions = locate_tokens(layout)
    video = torch.full((layout.tokens,), False)
    video[layout.video_start : layout.video_start + layout.video_tokens] = True
    low = torch.full((layout.tokens, 3), torch.iinfo(torch.int32).max)
    high, level = torch.full_like(low, -1), torch.zeros(layout.tokens, dtype=torch.int64)
    low[video], high[video], level[video] = positions, positions, measure_lattice(positions)

    def gather(values: Tensor, fill: int) -> Tensor:
        padding = -layout.tokens % block
        padded = F.pad(values[order].view(layout.tokens, -1), (0, 0, 0, padding), value=fill)
        return padded.view(-1, block, padded.shape[1])

    return Boxes(
        low=gather(low, torch.iinfo(torch.int32).max).amin(1),
        high=gather(high, -1).amax(1),
        level=gather(level, 0).amax(1).squeeze(1),
        has_text=gather((~video).long(), 0).amax(1).squeeze(1).bool(),
    )


def _list_spatial(layout: VideoLayout) -> Iterator[Pattern]:
    for share in _SHARES:
        reach = math.floor(share * layout.frames / 2)
        if reach < layout.frames - 1:
            yield Pattern(HeadKind.SPATIAL, reach=(reach, None, None))


def _list_temporal(layout: VideoLayout) -> Iterator[Pattern]:
    for share in _SHARES:
        half = math.sqrt(share) / 2
        rows, columns = math.floor(half * layout.height), math.floor(half * layout.width)
        if rows < layout.height - 1 or columns < layout.width - 1:
            yield Pattern(HeadKind.TEMPORAL, reach=(None, rows, columns))
