"""Video models, but for Wan and its kin."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from zoo.inputs import (
    TWO_ENCODERS,
    call,
    count,
    deferred,
    draw,
    draw_text,
    draw_video,
    fill,
    mask,
)
from zoo.record import HEADS, ROPE, TEXT, TOKENS, B, D, H, Model, T, W
from zoo.wan import WANS

model = functools.partial(Model, grid=(5, 13, 17))


@deferred
def locate_tokens(*sizes: int) -> torch.Tensor:
    """Coordinates `[1, 3, T * H * W]` of tokens."""
    return torch.cartesian_prod(*(torch.arange(n).float() for n in sizes)).T[None]


@deferred
def make_allegro_tables(frames: int, rows: int, columns: int) -> tuple[Any, Any]:
    """Rotary tables by axis, and which of their rows each token takes."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    tables = get_3d_rotary_pos_embed_allegro(
        embed_dim=48,
        crops_coords=((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=frames,
        interpolation_scale=(2.0, 2.0, 2.0),
        device=torch.device("cpu"),
    )
    axes = [torch.as_tensor(axis).long() for axis in tables[3:]]
    return tables[:3], tuple(torch.cartesian_prod(*axes).T[:, None])


def stand_in_for_torchvision() -> None:
    """Cosmos scales its padding mask by `torchvision.transforms`, which it imports only if there.

    One function of it is called, and torch has that function, too: no reason to install it.
    """
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.utils.import_utils import is_torchvision_available

    if is_torchvision_available():
        return

    def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, size=size, mode=interpolation)

    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    transformer_cosmos.__dict__.update(transforms=transforms)


# Tables: several entries on a line are easier to read than one.
# fmt: off
VIDEO_INPUTS = dict(hidden_states=draw_video(), timestep=fill(500),
    encoder_hidden_states=draw_text(9))
HUNYUAN_INPUTS = dict(VIDEO_INPUTS, encoder_hidden_states=draw_text(),
    encoder_attention_mask=mask(B, TEXT), pooled_projections=draw(B, 8), guidance=fill(6000.0))
COGVIDEOX_INPUTS = dict(VIDEO_INPUTS, hidden_states=draw(B, T, 4, 2 * H, 2 * W),
    encoder_hidden_states=draw_text(7))
COGVIDEOX_TABLES = call("diffusers.models.embeddings:get_3d_rotary_pos_embed", D, ((0, 0), (H, W)),
    (H, W), T)
LTX_INPUTS = dict(hidden_states=draw(B, TOKENS, 8), timestep=fill(500),
    encoder_hidden_states=draw_text(7), encoder_attention_mask=fill(True, B, 7))
MOCHI_INPUTS = dict(VIDEO_INPUTS, encoder_hidden_states=draw_text(16))
ALLEGRO_INPUTS = dict(VIDEO_INPUTS, encoder_attention_mask=fill(1.0, B, 9),
    image_rotary_emb=make_allegro_tables(T, H, W))
COSMOS_INPUTS = dict(VIDEO_INPUTS, fps=16, padding_mask=fill(0.0, B, 1, 2 * H, 2 * W))
STEP_BY_FRAME = fill(0.5, B, 1, T, 1, 1)
KANDINSKY_INPUTS = dict(hidden_states=draw(B, T, 2 * H, 2 * W, 4),
    encoder_hidden_states=draw_text(20), timestep=fill(500.0),
    pooled_projections=draw(B, 8))

SAME_CHANNELS = dict(in_channels=4, out_channels=4)
HUNYUAN = dict(HEADS, **SAME_CHANNELS, num_layers=1, num_single_layers=1, num_refiner_layers=1,
    patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=ROPE,
    guidance_embeds=True)
COGVIDEOX_2B = dict(HEADS, **SAME_CHANNELS, time_embed_dim=16, text_embed_dim=16, num_layers=2,
    sample_width=2 * W, sample_height=2 * H, sample_frames=4 * (T - 1) + 1, patch_size=2,
    max_text_seq_length=7)
COGVIDEOX = dict(COGVIDEOX_2B, use_rotary_positional_embeddings=True)
LTX = dict(HEADS, in_channels=8, out_channels=8, cross_attention_dim=2 * D, num_layers=2,
    caption_channels=16)
MOCHI = dict(HEADS, patch_size=2, num_layers=2, pooled_projection_dim=16, in_channels=4,
    text_embed_dim=16, time_embed_dim=16, max_sequence_length=16)
# Thirds of a head are even: one for each axis.
ALLEGRO = dict(SAME_CHANNELS, num_attention_heads=2, attention_head_dim=48, num_layers=2,
    cross_attention_dim=96, sample_height=2 * H, sample_width=2 * W, sample_frames=T,
    caption_channels=16)
COSMOS = dict(HEADS, **SAME_CHANNELS, num_layers=2, text_embed_dim=16, adaln_lora_dim=8,
    max_size=(16, 64, 64), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
    concat_padding_mask=True)
EASYANIMATE = dict(HEADS, out_channels=4, patch_size=2, sample_width=2 * W, sample_height=2 * H,
    num_layers=2, time_embed_dim=16, text_embed_dim=16)
KANDINSKY = dict(in_visual_dim=4, out_visual_dim=4, time_dim=32, model_dim=64, ff_dim=64,
    num_visual_blocks=2, axes_dims=(8, 12, 12))
KANDINSKY_TEXT = dict(KANDINSKY, in_text_dim=16, in_text_dim2=8, num_text_blocks=1)

VIDEO = (
    *WANS,
    model("hunyuan_video", "HunyuanVideoTransformer3DModel",
        "Double and single blocks over video then text, whose refiner masks by rows and columns.",
        HUNYUAN, HUNYUAN_INPUTS),
    model("hunyuan_video_i2v", "HunyuanVideoTransformer3DModel",
        "The first frame's tokens are modulated apart from the others.",
        dict(HUNYUAN, image_condition_type="token_replace"), HUNYUAN_INPUTS),
    # An embedding of zeros means that there is no picture.
    model("hunyuan_video15", "HunyuanVideo15Transformer3DModel",
        "Two text encoders and a picture, cut to their valid tokens: graphs that break.",
        dict(HEADS, in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1,
            text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=10, rope_axes_dim=ROPE),
        dict(TWO_ENCODERS, hidden_states=draw(B, 9, T, H, W), timestep=fill(500.0),
            image_embeds=fill(0.0, B, 25, 10))),
    model("framepack", "HunyuanVideoFramepackTransformer3DModel",
        "Frames of the past, at three scales, before the frames that are made; graphs that break.",
        dict(HUNYUAN, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True),
        dict(HUNYUAN_INPUTS, image_embeds=draw(B, 9, 10), indices_latents=count(20, 20 + T),
            latents_clean=draw_video(frames=2), indices_latents_clean=call(torch.tensor, [0, 19]),
            latents_history_2x=draw_video(frames=2), indices_latents_history_2x=count(17, 19),
            latents_history_4x=draw_video(frames=16), indices_latents_history_4x=count(1, 17))),
    model("motif", "MotifVideoTransformer3DModel",
        "The single blocks at the end are a decoder: over the video twice, encoded and embedded.",
        dict(HEADS, **SAME_CHANNELS, num_layers=1, num_single_layers=2, num_decoder_layers=1,
            text_embed_dim=16, rope_axes_dim=ROPE),
        dict(VIDEO_INPUTS, encoder_hidden_states=draw_text(30),
            encoder_attention_mask=mask(B, 30))),
    model("cogvideox_rope", "CogVideoXTransformer3DModel",
        "Text then video in one sequence; rotary tables are inputs.",
        COGVIDEOX, dict(COGVIDEOX_INPUTS, image_rotary_emb=COGVIDEOX_TABLES)),
    model("cogvideox_2b", "CogVideoXTransformer3DModel",
        "Positions are added to the patches, no rotation.",
        COGVIDEOX_2B, COGVIDEOX_INPUTS),
    model("cogvideox15", "CogVideoXTransformer3DModel",
        "Patches of two frames, by a linear layer instead of a convolution.",
        dict(COGVIDEOX, patch_size_t=2, patch_bias=False, ofs_embed_dim=16),
        dict(COGVIDEOX_INPUTS, hidden_states=draw(B, 2 * T, 4, 2 * H, 2 * W), ofs=fill(2.0),
            image_rotary_emb=call("diffusers.models.embeddings:get_3d_rotary_pos_embed", D, None,
                (H, W), T, grid_type="slice", max_size=(H, W)))),
    model("consisid", "ConsisIDTransformer3DModel",
        "A CogVideoX with a face: features of its own, read by cross-attention.",
        dict(COGVIDEOX, is_train_face=True, is_kps=False, cross_attn_interval=1,
            cross_attn_dim_head=16, cross_attn_num_heads=2, LFE_id_dim=16, LFE_vit_dim=16,
            LFE_depth=5, LFE_dim_head=16, LFE_num_heads=2, LFE_num_id_token=5, LFE_num_querie=8,
            LFE_output_dim=42, LFE_ff_mult=2, LFE_num_scale=5),
        dict(COGVIDEOX_INPUTS, image_rotary_emb=COGVIDEOX_TABLES, id_cond=draw(B, 16),
            id_vit_hidden=[draw(B, 9, 16)] * 5)),
    model("ltx", "LTXVideoTransformer3DModel",
        "Packed latents; only the rotary tables, made from its three sizes, tell the grid.",
        LTX, dict(LTX_INPUTS, num_frames=T, height=H, width=W)),
    model("ltx_coords", "LTXVideoTransformer3DModel",
        "Packed latents whose coordinates are an input: nothing in the graph tells the grid.",
        LTX, dict(LTX_INPUTS, video_coords=locate_tokens(T, H, W))),
    model("ltx2", "LTX2VideoTransformer3DModel",
        "Video and audio, each with a self-attention, and cross-attention both ways.",
        dict(LTX, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2,
            audio_attention_head_dim=16, audio_cross_attention_dim=32),
        dict(LTX_INPUTS, audio_hidden_states=draw(B, 40, 8), encoder_attention_mask=fill(1.0, B, 7),
            audio_encoder_hidden_states=draw_text(7), audio_num_frames=40, fps=24.0,
            audio_encoder_attention_mask=fill(1.0, B, 7), num_frames=T, height=H, width=W)),
    model("mochi", "MochiTransformer3DModel",
        "Cuts text to its valid tokens in a loop: Dynamo leaves all joint attention uncompiled.",
        MOCHI, dict(MOCHI_INPUTS, encoder_attention_mask=mask(B, 16, 0, dtype=torch.bool))),
    model("mochi_masked", "MochiTransformer3DModel",
        "The same with padded text.",
        MOCHI, dict(MOCHI_INPUTS, encoder_attention_mask=mask(B, 16, 7, dtype=torch.bool))),
    model("allegro", "AllegroTransformer3DModel",
        "Rotary tables and the positions that pick from them are inputs.",
        ALLEGRO, ALLEGRO_INPUTS),
    model("allegro_masked", "AllegroTransformer3DModel",
        "A mask over the video's own pixels, pooled to its tokens.",
        ALLEGRO, dict(ALLEGRO_INPUTS, attention_mask=fill(1.0, B, T, 2 * H, 2 * W))),
    model("cosmos", "CosmosTransformer3DModel",
        "A padding mask is one more channel; learned positions are added in each block.",
        COSMOS, COSMOS_INPUTS, prepare=stand_in_for_torchvision),
    model("cosmos2", "CosmosTransformer3DModel",
        "A timestep for each frame.",
        dict(COSMOS, extra_pos_embed_type=None),
        dict(COSMOS_INPUTS, condition_mask=None, timestep=STEP_BY_FRAME),
        prepare=stand_in_for_torchvision),
    model("cosmos25", "CosmosTransformer3DModel",
        "A mask of the given frames is one more channel; text is projected first.",
        dict(COSMOS, extra_pos_embed_type=None, in_channels=5, use_crossattn_projection=True,
            crossattn_proj_in_channels=16, encoder_hidden_states_channels=16),
        dict(COSMOS_INPUTS, timestep=STEP_BY_FRAME,
            condition_mask=fill(1.0, B, 1, T, 2 * H, 2 * W)), prepare=stand_in_for_torchvision),
    model("easyanimate", "EasyAnimateTransformer3DModel",
        "Text then video; the rotary tables are made in the graph.",
        dict(EASYANIMATE, in_channels=4, mmdit_layers=1), VIDEO_INPUTS),
    model("easyanimate_inp", "EasyAnimateTransformer3DModel",
        "Latents to fill in are more channels; two text encoders in one sequence.",
        dict(EASYANIMATE, in_channels=9, mmdit_layers=2, text_embed_dim_t5=12),
        dict(VIDEO_INPUTS, encoder_hidden_states_t5=draw_text(11, 12),
            inpaint_latents=draw_video(5))),
    model("latte", "LatteTransformer3DModel",
        "Spatial attention, frames in the batch, in turns with temporal attention of four tokens.",
        dict(HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64,
            attention_bias=True, sample_size=2 * H, patch_size=2, activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
            caption_channels=16, video_length=T), VIDEO_INPUTS, grid=(4, 33, 33)),
    model("sana_video", "SanaVideoTransformer3DModel",
        "Linear attention over the video, softmax only to the text.",
        dict(HEADS, **SAME_CHANNELS, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=16,
            sample_size=30, rope_max_seq_len=64),
        dict(VIDEO_INPUTS, encoder_attention_mask=fill(1.0, B, 9))),
    model("kandinsky5", "Kandinsky5Transformer3DModel",
        "Channels last; text has self-attention of its own, and is read by cross-attention.",
        dict(KANDINSKY_TEXT, patch_size=(1, 2, 2)),
        dict(KANDINSKY_INPUTS, visual_rope_pos=[count(0, T), count(0, H), count(0, W)],
            text_rope_pos=count(0, 20))),
    model("kandinsky6", "Kandinsky6Transformer3DModel",
        "Video and audio, each with a self-attention, and cross-attention both ways.",
        dict(KANDINSKY_TEXT, visual_cond=False, in_audio_dim=4, out_audio_dim=4),
        dict(KANDINSKY_INPUTS, audio_hidden_states=draw(B, 30, 4))),
    model("kandinsky6_sr", "Kandinsky6SRTransformer3DModel",
        "flex_attention with a block mask made from its queries and keys; no text.",
        KANDINSKY, {"hidden_states": draw(B, T, 16, 16, 9), "timestep": fill(500.0)}),
)
