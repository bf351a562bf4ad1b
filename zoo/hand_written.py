"""A model written by hand: its latents say where the softmax has its mass, so plans can be checked.

Tokens come in regions of whole blocks. What a plan of so many regions must keep, and what the model
then answers, follows from the latents alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REGIONS = 8
REGION_TOKENS = 128
HEADS = 2
HEAD_DIM = 16
# Mass of a region of queries in its own keys, which every plan keeps, and in four other regions.
# All differ, so that a plan of some of them is the only one that keeps so much with so few blocks.
SHARES = (0.25, 0.5, 0.125, 0.0635, 0.0615)
# The logit of a region without mass.
NOTHING = -30.0


class RegionAttention(torch.nn.Module):
    """One attention call over the queries, keys and values that lie side by side in the latents."""

    def __init__(self) -> None:
        super().__init__()
        width = 3 * HEADS * HEAD_DIM
        self.to_qkv = torch.nn.Linear(width, width, bias=False)
        self.embed_time = torch.nn.Linear(8, width)
        torch.nn.init.eye_(self.to_qkv.weight)
        # The timestep tells the step, and changes nothing.
        torch.nn.init.zeros_(self.embed_time.weight)
        torch.nn.init.zeros_(self.embed_time.bias)
        self.requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * 10.0 ** -torch.arange(4)
        time = self.embed_time(torch.cat([angles.sin(), angles.cos()], -1))
        qkv = self.to_qkv(latents + time[:, None]).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def draw_mass(seed: int) -> Tensor:
    """`[HEADS, REGIONS, REGIONS]`: each row has `SHARES` in its own region and in random others."""
    noise = torch.rand(HEADS, REGIONS, REGIONS, generator=torch.Generator().manual_seed(seed))
    order = (noise - torch.eye(REGIONS)).argsort(-1)
    shares = torch.zeros(REGIONS)
    shares[: len(SHARES)] = torch.tensor(SHARES)
    return torch.zeros(order.shape).scatter(-1, order, shares.expand(order.shape))


def keep_heaviest(mass: Tensor, regions: int) -> Tensor:
    """Which regions a plan of so many in each row keeps: the own one, then those of most mass."""
    ranked = mass + torch.eye(REGIONS)
    places = ranked.argsort(-1, descending=True).argsort(-1)
    return places < regions


def make_latents(mass: Tensor) -> Tensor:
    """Latents `[1, N, C]` by which each token gives each region of keys its share of the mass."""
    queries = torch.eye(REGIONS).expand(mass.shape)
    keys = mass.log().clamp(min=NOTHING).mT * HEAD_DIM**0.5
    rest = (0, HEAD_DIM - REGIONS)
    q, k = (F.pad(x, rest).repeat_interleave(REGION_TOKENS, 1) for x in (queries, keys))
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([x.transpose(0, 1).flatten(1) for x in (q, k, v)], -1)[None]


def attend(latents: Tensor, kept: Tensor) -> Tensor:
    """The model's answer `[1, N, HEADS * HEAD_DIM]` where rows see only regions that are kept."""
    q, k, v = latents.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    mask = kept.repeat_interleave(REGION_TOKENS, 1).repeat_interleave(REGION_TOKENS, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
