"""How much softmax mass the best key blocks of a model's self-attention hold.

    python -m benchmarks.attention_mass --checkpoint FILE [--prompts 2] [--steps 20] [--json F]

Exact: every score is computed, in cubes of 64 tokens, and each query block takes its best quarter
of key blocks. It says how sparse a model's attention is before any router is asked.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch.overrides import TorchFunctionMode

from dit_opt.demo import clips
from dit_opt.demo.model import CHECKPOINT, GRID, load_model
from dit_opt.demo.sampler import STEPS, denoise
from dit_opt.kernels.plan.orders import VideoLayout, order_cubes
from dit_opt.kernels.searches.mass.blocks import measure_block_mass

TOKENS = GRID[0] * GRID[1] * GRID[2]
# tokens of a cube of 4 x 4 x 4
BLOCK = 64
NOISE_LEVELS = (0.9, 0.6, 0.3)


def best_share_mass(q: torch.Tensor, k: torch.Tensor, share: float = 0.25) -> torch.Tensor:
    """Mass `[H]` that the best `share` of key blocks holds, averaged over query blocks.

    Args:
        q, k: `[H, N, D]` over the demo grid.
    """
    order = order_cubes(VideoLayout(*GRID, 0, q.shape[1]))
    q, k = (x[None, :, order].float() for x in (q, k))
    mass = measure_block_mass(q, k, q.shape[-1] ** -0.5, BLOCK, BLOCK)
    kept = max(1, round(share * mass.shape[-1]))
    return mass[0].topk(kept, dim=-1).values.sum(-1).mean(-1)


@dataclass(frozen=True)
class Call:
    """One self-attention call: its layer, and q, k, v `[1, H, N, D]`."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def measure_mass(self) -> torch.Tensor:
        """`best_share_mass` of the call."""
        return best_share_mass(self.q[0], self.k[0])


class RecordCalls(TorchFunctionMode):
    """Keeps the inputs of every self-attention call over the demo grid."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._layers = layers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_attention = func is torch.nn.functional.scaled_dot_product_attention
        if is_attention and kwargs["key"].shape[-2] == TOKENS:
            qkv = [kwargs[name] for name in ("query", "key", "value")]
            self.calls.append(Call(len(self.calls) % self._layers, *qkv))
        return func(*args, **kwargs)


@torch.no_grad()
def record_noised(
    model, clip: torch.Tensor, prompts: list[clips.Prompt], rng: torch.Generator
) -> list[Call]:
    """The calls of one forward of a clip `[1, 3, T, H, W]` at each of `NOISE_LEVELS`."""
    noise = torch.randn(clip.shape, generator=rng)
    places = clips.locate()[None]
    with RecordCalls(len(model.blocks)) as record:
        for sigma in NOISE_LEVELS:
            model(
                hidden_states=torch.cat([(1 - sigma) * clip + sigma * noise, places], 1),
                timestep=torch.tensor([sigma * 1000]),
                encoder_hidden_states=clips.embed(prompts),
            )
    return record.calls


def measure_mass(model, prompts: list[clips.Prompt], steps: int, every: int = 5) -> torch.Tensor:
    """Mass `[calls, layers, H]` over some steps and both branches of dense runs."""
    layers, rows = len(model.blocks), []
    for seed, prompt in enumerate(prompts):
        counter = {"call": 0}

        def run(counter=counter, **kwargs):
            index = counter["call"] // 2
            counter["call"] += 1
            if index % every != every // 2:
                return model(**kwargs)
            with RecordCalls(layers) as record:
                out = model(**kwargs)
            rows.append(torch.stack([call.measure_mass() for call in record.calls]))
            return out

        for _ in denoise(run, prompt, seed, steps):
            pass
    return torch.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_model(args.checkpoint)
    mass = measure_mass(model, clips.list_prompts(args.prompts), args.steps)
    per_head = mass.mean(0)
    heads = [f"head {h}" for h in range(per_head.shape[1])]
    rows = [[f"layer {i}", *row.tolist()] for i, row in enumerate(per_head)]
    print(tabulate(rows, ["", *heads], floatfmt=".3f"))
    print(f"mass of the best quarter: {mass.mean():.4f}")
    if args.json:
        result = {"mass_best_quarter": mass.mean().item(), "per_head": per_head.tolist()}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
