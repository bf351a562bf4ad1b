"""The demo model: its configuration, its checkpoint and its sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dit_opt.demo import clips

CHECKPOINT = Path(__file__).with_name("model.safetensors")
CONFIG: dict[str, Any] = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    # colours, then places
    "in_channels": 3 + clips.PLACE_CHANNELS,
    "out_channels": 3,
    "text_dim": clips.TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 640,
    "num_layers": 5,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
GRID = (clips.FRAMES, clips.HEIGHT // 4, clips.WIDTH // 4)


class CheckpointError(RuntimeError):
    """The demo checkpoint is missing or damaged."""


def save_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write weights in half precision; the file appears whole or not at all."""
    half = {k: v.half().contiguous() for k, v in state.items()}
    part = path.with_suffix(".part")
    save_file(half, part)
    part.replace(path)


def load_model(path: Path = CHECKPOINT) -> torch.nn.Module:
    """The demo model in fp32 and eval mode.

    Raises CheckpointError where the file is missing, cut short or of another model.
    """
    from diffusers import WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage] - lazy

    if not path.exists():
        raise CheckpointError(
            f"The demo checkpoint {path} is missing; reinstall ditopt, or train one with "
            "`python -m benchmarks.train_demo_model --out DIR` and pass it with --checkpoint."
        )
    model = WanTransformer3DModel(**CONFIG)
    try:
        state = load_file(path)
        model.load_state_dict({k: v.float() for k, v in state.items()})
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"The demo checkpoint {path} cannot be read ({str(error).splitlines()[0]}); reinstall "
            "ditopt or name another file with --checkpoint."
        ) from error
    return model.eval().requires_grad_(False)
