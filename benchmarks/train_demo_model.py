"""Train the demo model: a small diffusers video transformer, by flow matching on generated clips.

    python -m benchmarks.train_demo_model --out DIR [--minutes 90] [--threads 2]

Small grids first, where a step is cheap, then the demo grid. Attention starts local: each head's
query and key biases are set so that rotary embedding alone makes scores fall off with distance
along the axes of that head (time, space or both), the structure that large video models are
reported to learn. Everything is trained from there. The log says how much softmax mass the best
quarter of key blocks holds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from dit_opt.demo import clips
from dit_opt.demo.model import CONFIG, save_checkpoint

log = logging.getLogger("train_demo_model")

# score drop in nats of the first rotary frequencies, per head role: (time, space)
HEAD_ROLES = ((0.0, 2.5), (1.5, 1.5), (2.5, 0.5), (0.5, 0.8))
FREQUENCIES = 3


@dataclass(frozen=True)
class Phase:
    """One stretch of training: pixels per clip, batch, share of the time, peak learning rate."""

    size: tuple[int, int, int]
    batch: int
    share: float
    rate: float


PHASES = (
    Phase((8, 32, 32), 8, 0.34, 1.6e-3),
    Phase((8, 32, 64), 4, 0.26, 1.2e-3),
    Phase((8, 64, 128), 1, 0.40, 9e-4),
)


@torch.no_grad()
def start_local(model: WanTransformer3DModel) -> None:
    """Set query and key biases so that each head's score falls off with distance (see above).

    A bias pair of squared length a along rotary frequency w adds a * cos(w * distance) / sqrt(D)
    to every score.
    """
    dim = model.config.attention_head_dim
    heads = model.config.num_attention_heads
    space = 2 * (dim // 6)
    starts = {"time": 0, "height": dim - 2 * space, "width": dim - space}
    for layer, block in enumerate(model.blocks):
        attn = block.attn1
        bias = torch.zeros(heads, dim)
        for head in range(heads):
            # the last layers' free head is local too: detail is what they draw
            role = HEAD_ROLES[head if layer < 3 else head % 3]
            for axis, start in starts.items():
                drop = role[0] if axis == "time" else role[1]
                for f in range(FREQUENCIES):
                    bias[head, start + 2 * f] = math.sqrt(drop * math.sqrt(dim))
        content = 0.7
        gain = math.sqrt(content**2 + bias.square().mean().item())
        for linear, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)):
            linear.bias.copy_(bias.flatten())
            linear.weight.normal_(std=content / math.sqrt(linear.in_features))
            norm.weight.fill_(gain)


def build_model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG)
    start_local(model)
    # as in adaLN-zero: blocks begin as the identity
    torch.nn.init.zeros_(model.condition_embedder.time_proj.weight)
    torch.nn.init.zeros_(model.condition_embedder.time_proj.bias)
    for block in model.blocks:
        block.scale_shift_table.data.zero_()
        block.scale_shift_table.data[:, [2, 5]] = 0.3
        torch.nn.init.normal_(block.attn2.to_out[0].weight, std=0.02)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def split_parameters(model) -> tuple[list, list]:
    """Matrices of the blocks for Muon; embeddings, vectors, biases and output for AdamW."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and name.startswith("blocks") else rest).append(p)
    return matrices, rest


def sample_noise_level(count: int, rng: torch.Generator) -> torch.Tensor:
    """Stratified sigma in (0, 1), a little more of it at high noise."""
    u = (torch.rand(count, generator=rng) + torch.arange(count)) / count
    return 1.5 * u / (1 + 0.5 * u)


def run_step(model, phase: Phase, rng: torch.Generator) -> torch.Tensor:
    clip, prompts = clips.draw_batch(phase.batch, rng, phase.size)
    keep = torch.rand(phase.batch, generator=rng) > 0.1
    text = clips.embed([p if k else None for p, k in zip(prompts, keep)])
    if phase.batch == 1:
        sigma = sample_noise_level(1, rng)
    else:
        sigma = sample_noise_level(phase.batch, rng)
    noise = torch.randn(clip.shape, generator=rng)
    s = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - s) * clip + s * noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - clip)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, help="stop early, for trials")
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.out / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    train(args)


def train(args) -> None:
    model = build_model().train()
    matrices, rest = split_parameters(model)
    count = sum(p.numel() for p in model.parameters())
    log.info("%.2f M parameters, %s", count / 1e6, [asdict(p) for p in PHASES])
    muon = torch.optim.Muon(
        matrices, lr=1e-3, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    state_file, progress_file = args.out / "state.safetensors", args.out / "progress.json"
    if args.resume and state_file.exists():
        state = load_file(state_file)
        model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        average = {k[4:]: v for k, v in state.items() if k.startswith("ema.")}
        progress = json.loads(progress_file.read_text())
        step, spent = progress["step"], progress["seconds"]
    rng = torch.Generator().manual_seed(1000 + step)
    budget, recent = args.minutes * 60, []
    edges = torch.tensor([p.share for p in PHASES]).cumsum(0).tolist()
    began = saved = time.monotonic() - 0.0
    offset = spent
    while spent < budget and (args.steps is None or step < args.steps):
        progress = spent / budget
        which = next((i for i, e in enumerate(edges) if progress < e), len(PHASES) - 1)
        phase = PHASES[which]
        # within a phase the rate falls by half, at the very end to zero
        start = edges[which] - phase.share
        inside = (progress - start) / phase.share
        rate = phase.rate * (1 - 0.5 * inside)
        if which == len(PHASES) - 1:
            rate = phase.rate * (1 - inside) + 1e-5
        rate *= min(1.0, (step + 1) / 60)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = run_step(model, phase, rng)
        if phase.batch == 1:
            # two clips a step on the demo grid, one after the other for memory
            (loss / 2).backward()
            second = run_step(model, phase, rng)
            (second / 2).backward()
            loss = (loss + second) / 2
        else:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.998, 1 - 1 / (step + 1))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        recent.append(loss.item())
        spent = offset + time.monotonic() - began
        if step % args.log_every == 0:
            log.info(
                "step %d phase %d loss %.4f norm %.2f rate %.1e %.2f s/step %.0f min",
                step,
                which,
                sum(recent) / len(recent),
                norm,
                rate,
                (time.monotonic() - saved) / len(recent) if step == args.log_every else 0,
                spent / 60,
            )
            recent.clear()
        if step % 100 == 0:
            save_checkpoint(args.out / "model.safetensors", average)
            state = {f"model.{k}": v for k, v in model.state_dict().items()}
            state |= {f"ema.{k}": v for k, v in average.items()}
            save_file({k: v.contiguous() for k, v in state.items()}, state_file)
            progress_file.write_text(json.dumps({"step": step, "seconds": spent}))
    save_checkpoint(args.out / "model.safetensors", average)
    log.info("finished after %d steps", step)


if __name__ == "__main__":
    main()
