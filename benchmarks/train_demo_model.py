"""Train the demo model: a small diffusers video transformer, by flow matching on generated clips.

    python -m benchmarks.train_demo_model --out DIR [--minutes 170] [--threads 2]

Crops first, where a step is cheap, then whole clips: a model that is told where each pixel is
learns from crops where things are. For a while they are mostly noise, since less noise shows it.
Attention starts local: each head's query and key biases are set so that rotary embedding alone
makes scores fall off with distance along the axes of that head (time, space or both), the structure
that large video models are reported to learn. Everything is trained from there. A small model in
little time would let some heads go flat, which those of large models are not: attention that is
spread over more than `SPREAD` of the tokens is charged for its entropy. The log says how much
softmax mass the best quarter of key blocks holds.
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
from torch.overrides import TorchFunctionMode

from benchmarks.attention_mass import record_noised
from dit_opt.demo import clips
from dit_opt.demo.model import CONFIG, save_checkpoint

log = logging.getLogger("train_demo_model")

# score drop in nats of the first rotary frequencies, per head role: (time, space)
HEAD_ROLES = ((0.0, 2.5), (1.5, 1.5), (2.5, 0.5), (0.5, 0.8))
FREQUENCIES = 3


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        size: frames, height and width of a crop in pixels.
        batch: crops in one step.
        share: of the whole time. rate: learning rate at its start.
        shift: how much of it is high noise, as the shift of a flow-matching scheduler.
    """

    size: tuple[int, int, int]
    batch: int
    share: float
    rate: float
    shift: float


PHASES = (
    Phase((16, 32, 32), 6, 0.30, 1.4e-3, 3.0),
    Phase((16, 32, 32), 6, 0.35, 1.2e-3, 20.0),
    Phase((16, 64, 64), 1, 0.35, 8e-4, 4.0),
)
# the effective number of keys of a query, as a share of all, above which entropy is charged
SPREAD = 0.04
ENTROPY_WEIGHT = 0.03
ENTROPY_ROWS = 16
SAVE_EVERY, MASS_EVERY = 100, 500


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


def sample_noise_level(count: int, shift: float, rng: torch.Generator) -> torch.Tensor:
    """Stratified sigma in (0, 1), more of it at high noise: where things are is decided there."""
    u = (torch.rand(count, generator=rng) + torch.arange(count)) / count
    return shift * u / (1 + (shift - 1) * u)


class EntropyCharge(TorchFunctionMode):
    """Adds up the entropy above `log(SPREAD * N)` of sampled rows of every self-attention call."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        # One sum, because the length of a list would make every layer a graph of its own.
        self.total = torch.zeros(())
        self._rows = rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k = kwargs["query"], kwargs["key"]
            tokens = q.shape[-2]
            if tokens == k.shape[-2]:
                scores = (
                    q[:, :, self._rows].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
                )
                entropy = torch.special.entr(scores.softmax(-1)).sum(-1)
                self.total = self.total + (entropy - math.log(SPREAD * tokens)).relu().mean()
        return func(*args, **kwargs)


def draw_crops(
    clip: torch.Tensor, size: tuple[int, int, int], rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A crop of each clip at a random place, and where its pixels are."""
    both = torch.cat([clip, clips.locate().expand(len(clip), -1, -1, -1, -1)], 1)
    crops = []
    for whole in both:
        for axis, (n, patch) in enumerate(zip(size, CONFIG["patch_size"], strict=True), 1):
            last = (whole.shape[axis] - n) // patch
            start = patch * int(torch.randint(last + 1, (), generator=rng))
            whole = whole.narrow(axis, start, n)
        crops.append(whole)
    crop, places = torch.stack(crops).split([clip.shape[1], clips.PLACE_CHANNELS], 1)
    return crop, places


def run_step(model, phase: Phase, rng: torch.Generator) -> float:
    """Add up the gradients of one step; returns its loss."""
    sigma = sample_noise_level(phase.batch, phase.shift, rng)
    clip, prompts = clips.draw_batch(phase.batch, rng)
    clip, places = draw_crops(clip, phase.size, rng)
    keep = torch.rand(phase.batch, generator=rng) > 0.1
    text = clips.embed([p if k else None for p, k in zip(prompts, keep, strict=True)])
    noise = torch.randn(clip.shape, generator=rng)
    s = sigma.view(-1, 1, 1, 1, 1)
    tokens = clip[0, 0].numel() // math.prod(CONFIG["patch_size"])
    rows = torch.randint(tokens, (ENTROPY_ROWS,), generator=rng)
    with torch.autocast("cpu", dtype=torch.bfloat16), EntropyCharge(rows) as entropy:
        velocity = model(
            hidden_states=torch.cat([(1 - s) * clip + s * noise, places], 1),
            timestep=sigma * 1000,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
    loss = (velocity.float() - (noise - clip)).square().mean()
    (loss + ENTROPY_WEIGHT * entropy.total / len(model.blocks)).backward()
    return loss.item()


def choose_rate(progress: float, steps: int) -> tuple[int, float]:
    """The phase and its learning rate: halved within a phase, to nothing in the last one.

    `steps` counts from the last start, whose optimizers know nothing yet.
    """
    edges = torch.tensor([p.share for p in PHASES]).cumsum(0).tolist()
    which = next((i for i, e in enumerate(edges) if progress < e), len(PHASES) - 1)
    phase = PHASES[which]
    inside = min(1.0, (progress - edges[which] + phase.share) / phase.share)
    rate = (
        phase.rate * (1 - inside) + 1e-5 if phase is PHASES[-1] else phase.rate * (1 - inside / 2)
    )
    return which, rate * min(1.0, (steps + 1) / 30)


def measure_model_mass(state: dict[str, torch.Tensor]) -> float:
    """Mass of the best quarter of key blocks, of one noised clip at a few noise levels."""
    model = WanTransformer3DModel(**CONFIG).eval()
    model.load_state_dict(state)
    rng = torch.Generator().manual_seed(7)
    clip, prompts = clips.draw_batch(1, rng)
    calls = record_noised(model, clip, prompts, rng)
    return torch.stack([call.measure_mass() for call in calls]).mean().item()


def save_progress(folder: Path, model, average: dict, step: int, seconds: float) -> None:
    save_checkpoint(folder / "model.safetensors", average)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in average.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "state.safetensors")
    (folder / "progress.json").write_text(json.dumps({"step": step, "seconds": seconds}))


def train(args: argparse.Namespace) -> None:
    model = build_model().train()
    step, spent = 0, args.skip_minutes * 60
    if args.start:
        model.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if args.resume:
        state = load_file(args.out / "state.safetensors")
        model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        average = {k[4:]: v for k, v in state.items() if k.startswith("ema.")}
        progress = json.loads((args.out / "progress.json").read_text())
        step, spent = progress["step"], progress["seconds"]
    if not args.no_compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    matrices, rest = split_parameters(model)
    optimizers = [
        torch.optim.Muon(
            matrices, lr=1e-3, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    count = sum(p.numel() for p in model.parameters())
    log.info("%.2f M parameters, %s", count / 1e6, [asdict(p) for p in PHASES])
    rng = torch.Generator().manual_seed(1000 + step)
    first = step
    budget, began, recent = args.minutes * 60, time.monotonic() - spent, []
    while spent < budget and (args.steps is None or step < args.steps):
        which, rate = choose_rate(spent / budget, step - first)
        loss = run_step(model, PHASES[which], rng)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - min(0.995, 1 - 1 / (step + 1)))
        recent.append((loss, time.monotonic() - began - spent))
        spent = time.monotonic() - began
        if step % args.log_every == 0:
            losses, seconds = (sum(x) / len(recent) for x in zip(*recent, strict=True))
            log.info(
                "step %d phase %d loss %.4f norm %.2f rate %.1e %.2f s/step %.0f min",
                *(step, which, losses, norm, rate, seconds, spent / 60),
            )
            recent.clear()
        if step % MASS_EVERY == 0:
            log.info("step %d mass of the best quarter %.3f", step, measure_model_mass(average))
        if step % SAVE_EVERY == 0:
            save_progress(args.out, model, average, step, spent)
    save_progress(args.out, model, average, step, spent)
    log.info("finished after %d steps", step)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=170)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="checkpoint to begin from")
    parser.add_argument(
        "--skip-minutes", type=float, default=0, help="begin so far into the schedule"
    )
    parser.add_argument("--no-compile", action="store_true", help="run the blocks eager")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument("--steps", type=int, help="stop early, for trials")
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.out / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
