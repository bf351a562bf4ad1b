"""Small attention problems for the tests of searches, and what plain arithmetic says about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.reference import expand_blocks, expand_lists
from dit_opt.kernels.plan.budgets import allot_blocks
from dit_opt.kernels.plan.plan import BlockLayout, Plan, lay_blocks
from dit_opt.kernels.searches.mass.blocks import measure_block_mass

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scene:
    """One self-attention; `peaks` is how sharp each head looks, cycled over the heads."""

    tokens: int = 150
    video_start: int = 0
    video_tokens: int = 150
    batch: int = 1
    heads: int = 3
    key_heads: int = 3
    dim: int = 16
    block_q: int = 32
    block_k: int = 16
    bias: bool = False
    peaks: tuple[float, ...] = (0.5, 2.0, 4.0)

    @property
    def blocks(self) -> BlockLayout:
        return lay_blocks(
            self.tokens, self.video_start, self.video_tokens, self.block_q, self.block_k, CPU
        )

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where the video is and how blocks are cut, as operators take it."""
        return self.video_start, self.video_tokens, self.block_q, self.block_k


SCENES = {
    "video only": Scene(),
    "text before": Scene(tokens=141, video_start=20, video_tokens=121),
    "text after": Scene(tokens=169, video_tokens=128),
    "grouped heads, batch": Scene(batch=2, heads=4, key_heads=2, tokens=131, video_tokens=99),
    "bias": Scene(batch=2, tokens=150, video_tokens=120, bias=True),
}


def make_inputs(scene: Scene, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """q, k, key_bias and scale; neighbours in the sequence look alike, as in a video."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(
        scene.batch, scene.heads + scene.key_heads, scene.tokens, scene.dim, generator=generator
    )
    walk = walk.cumsum(2) * 0.3 + walk * 0.3
    walk = walk / walk.norm(dim=-1, keepdim=True) * scene.dim**0.5
    q, k = walk.split([scene.heads, scene.key_heads], 1)
    peaks = torch.tensor([scene.peaks[i % len(scene.peaks)] for i in range(scene.heads)])
    bias = None
    if scene.bias:
        bias = torch.zeros(scene.batch, 1, scene.tokens)
        bias[0, :, -7:] = -torch.inf
        bias[1:, :, -25:] = -torch.inf
    return q * peaks[:, None, None], k, bias, scene.dim**-0.5


def weigh_tokens(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The softmax over all keys, float64 [B, H, N, N]."""
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    return (scores if bias is None else scores + bias.unsqueeze(-2)).softmax(-1)


def plan_exactly(
    scene: Scene,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    target: float,
    by_density: bool,
    **options: Any,
) -> Plan:
    """The plan by the exact mass of every row."""
    mass = measure_block_mass(q, k, scale, scene.block_q, scene.block_k, bias)
    return allot_blocks(mass, scene.blocks, target, by_density, **options)


def average_blocks(weights: Tensor, block_q: int, block_k: int) -> Tensor:
    """Token weights [..., N, N] as block mass [..., nq, nk]."""
    columns = torch.stack([x.sum(-1) for x in weights.split(block_k, -1)], -1)
    return torch.stack([x.mean(-2) for x in columns.split(block_q, -2)], -2)


def mask_blocks(plan: Plan, blocks: BlockLayout) -> Tensor:
    """Which blocks a plan keeps, bool [B, H, nq, nk]."""
    return expand_lists(plan.counts, plan.indices, blocks.always_kept.shape[1])


def check_plan(plan: Plan, blocks: BlockLayout) -> Tensor:
    """Assert what holds for every plan and return its block mask."""
    assert plan.counts.dtype == plan.indices.dtype == torch.int32
    assert plan.recall.dtype == plan.density.dtype == torch.float32
    mask = mask_blocks(plan, blocks)
    assert (mask.sum(-1) == plan.counts).all(), "an entry is repeated or out of range"
    used = torch.arange(plan.indices.shape[-1]) < plan.counts[..., None]
    ascending = plan.indices.diff(dim=-1) > 0
    assert (ascending | ~used[..., 1:]).all()
    assert not plan.indices[~used].any()
    assert (mask | ~blocks.always_kept).all(), "something that is always kept is missing"
    tokens = expand_blocks(mask, blocks.tokens, blocks.tokens, blocks.block_q, blocks.block_k)
    torch.testing.assert_close(plan.density, tokens.float().mean((-2, -1)), rtol=1e-5, atol=1e-6)
    return mask


def video_rows(scene: Scene) -> Tensor:
    """Tokens in query blocks without any text, bool [N]."""
    text = torch.ones(scene.tokens, dtype=torch.bool)
    text[scene.video_start : scene.video_start + scene.video_tokens] = False
    return ~torch.cat([x.any().expand(len(x)) for x in text.split(scene.block_q)])
