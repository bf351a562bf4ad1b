"""Tiny seeded diffusers transformers with inputs, so that every test may ask for a real graph.

T, H and W all differ, so that a swap of two grid axes shows; all weights are seeded, because the
zero-initialised gates of adaptive layer norms would make the blocks vanish and hide every error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TinyModel:
    """A model in eval mode, its inputs, and what the facts of its graph must say.

    `grid` is (T, H, W) in tokens, None where the graph cannot know it. `text_tokens` counts the
    text tokens of the joint sites (0 where text comes in by cross-attention only). `n_sites` counts
    all attention calls, self, joint and cross, the text refiner's included.
    """

    name: str
    model: torch.nn.Module
    inputs: dict[str, Any]
    grid: tuple[int, int, int] | None
    text_tokens: int
    n_sites: int

    def __call__(self, model: Callable[..., Any] | None = None) -> torch.Tensor:
        """Run `model` (by default the eager one) on the inputs without gradients."""
        with torch.no_grad():
            return (self.model if model is None else model)(**self.inputs)[0]


def wan(batch: int = 1, grid: tuple[int, int, int] = (3, 4, 5), layers: int = 2) -> TinyModel:
    """Text by cross-attention, patch embedding (1, 2, 2), rotary tables sliced from buffers."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    t, h, w = grid
    inputs = {
        "hidden_states": _randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": _randn(batch, 7, 16),
    }
    return _tiny("wan", model, inputs, grid, 0, 2 * layers)


def break_apart(model: torch.nn.Module) -> torch.nn.Module:
    """Have Dynamo break a Wan where the timestep has been embedded and the tokens are made."""
    inner = model.condition_embedder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        torch._dynamo.graph_break()
        return out

    model.condition_embedder.forward = forward
    return model


def hunyuan_video(
    batch: int = 1,
    grid: tuple[int, int, int] = (3, 4, 5),
    layers: int = 1,
    image_condition: str | None = None,
) -> TinyModel:
    """Joint attention with a key-padding mask, double- and single-stream blocks, a text refiner.

    `image_condition="token_replace"` modulates the first frame apart from the others.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition,
    )
    t, h, w = grid
    text = 7
    # The last text tokens of each sample are padding.
    mask = torch.arange(text)[None] < torch.tensor([[text - 2 - i] for i in range(batch)])
    inputs = {
        "hidden_states": _randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": _randn(batch, text, 16),
        "encoder_attention_mask": mask.long(),
        "pooled_projections": _randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }
    return _tiny("hunyuan_video", model, inputs, grid, text, 2 * layers + 1)


def cogvideox(batch: int = 1, grid: tuple[int, int, int] = (3, 4, 5), layers: int = 2) -> TinyModel:
    """Joint attention, text first, latents (B, T, C, H, W), rotary tables given as inputs."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    t, h, w = grid
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=layers,
        sample_width=2 * w,
        sample_height=2 * h,
        sample_frames=4 * (t - 1) + 1,
        patch_size=2,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": _randn(batch, t, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": _randn(batch, 7, 16),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (h, w)), (h, w), t),
    }
    return _tiny("cogvideox", model, inputs, grid, 7, layers)


def ltx_video(batch: int = 1, grid: tuple[int, int, int] = (3, 4, 5), layers: int = 2) -> TinyModel:
    """Tokens come packed; only the rotary tables, made from num_frames, height, width, tell."""
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=16,
    )
    t, h, w = grid
    inputs = {
        "hidden_states": _randn(batch, t * h * w, 8),
        "encoder_hidden_states": _randn(batch, 7, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, 7).bool(),
        "num_frames": t,
        "height": h,
        "width": w,
    }
    return _tiny("ltx_video", model, inputs, grid, 0, 2 * layers)


def flux(batch: int = 1, grid: tuple[int, int] = (4, 5), layers: int = 1) -> TinyModel:
    """Tokens come packed and positions as ids: the graph holds no grid."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    h, w = grid
    ids = torch.zeros(h, w, 3)
    ids[..., 1] = torch.arange(h)[:, None]
    ids[..., 2] = torch.arange(w)[None]
    inputs = {
        "hidden_states": _randn(batch, h * w, 8),
        "encoder_hidden_states": _randn(batch, 7, 16),
        "pooled_projections": _randn(batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.reshape(h * w, 3),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.full((batch,), 3.5),
    }
    return _tiny("flux", model, inputs, None, 7, 2 * layers)


def sd3(batch: int = 1, grid: tuple[int, int] = (4, 5), layers: int = 2) -> TinyModel:
    """Joint attention, latents first; the first block also has a latent-only site (as SD 3.5)."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    h, w = grid
    inputs = {
        "hidden_states": _randn(batch, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _randn(batch, 7, 16),
        "pooled_projections": _randn(batch, 8),
        "timestep": torch.full((batch,), 500),
    }
    return _tiny("sd3", model, inputs, (1, h, w), 7, layers + 1)


def qwen_image(
    batch: int = 1,
    pictures: tuple[tuple[int, int, int], ...] = ((1, 4, 5), (1, 4, 5)),
    layers: int = 1,
) -> TinyModel:
    """Packed latents, then the pictures of an edit, behind text; rotary tables by picture."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": _randn(batch, sum(t * h * w for t, h, w in pictures), 8),
        "encoder_hidden_states": _randn(batch, 7, 16),
        "encoder_hidden_states_mask": torch.ones(batch, 7, dtype=torch.long),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [list(pictures)] * batch,
    }
    frames = sum(t for t, _, _ in pictures)
    grid = (frames, *pictures[0][1:]) if len({p[1:] for p in pictures}) == 1 else None
    return _tiny("qwen_image", model, inputs, grid, 7, layers)


def z_image(
    batch: int = 1, grid: tuple[int, int] = (4, 5), texts: tuple[int, ...] = (7,), layers: int = 1
) -> TinyModel:
    """Lists of samples, each padded to a multiple of 32 tokens, image before text."""
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    h, w = grid
    inputs = {
        "x": [_randn(4, 1, 2 * h, 2 * w) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [_randn(texts[i % len(texts)], 16) for i in range(batch)],
    }
    return _tiny("z_image", model, inputs, (1, h, w), texts[0], layers + 2)


def dit(batch: int = 1, size: int = 6, layers: int = 2) -> TinyModel:
    """Class-conditional, learned position table; the model fixes the image to size x size."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=layers,
        sample_size=2 * size,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": _randn(batch, 4, 2 * size, 2 * size),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % 10,
    }
    return _tiny("dit", model, inputs, (1, size, size), 0, layers)


ALL: tuple[Callable[..., TinyModel], ...] = (
    wan,
    hunyuan_video,
    cogvideox,
    ltx_video,
    flux,
    sd3,
    dit,
)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _tiny(
    name: str,
    model: torch.nn.Module,
    inputs: dict[str, Any],
    grid: tuple[int, int, int] | None,
    text_tokens: int,
    n_sites: int,
) -> TinyModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Matrices keep the scale of their inputs; vectors (norms, biases) sit near one half.
            noise = torch.randn(parameter.shape, generator=generator)
            flat = parameter.dim() == 1
            fan_in = 1 if flat else max(1, parameter[0].numel())
            parameter.copy_(0.5 + 0.1 * noise if flat else noise * fan_in**-0.5)
    model.eval().requires_grad_(False)
    return TinyModel(name, model, {**inputs, "return_dict": False}, grid, text_tokens, n_sites)
