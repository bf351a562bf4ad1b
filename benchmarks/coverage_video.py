"""Tiny diffusers video models with inputs, for `benchmarks.coverage`.

Classes are looked up inside of the builders: one that an older diffusers lacks fails alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from diffusers.utils import is_torchvision_available

from benchmarks.coverage_models import (
    COLUMNS,
    FRAMES,
    IMAGE_ROWS,
    ROWS,
    Builder,
    Built,
    ask_by_two_encoders,
    draw,
    draw_video,
    fill,
    mask_text,
)

TOKENS = FRAMES * ROWS * COLUMNS
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
HUNYUAN_VIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (8, 12, 12),
    "guidance_embeds": True,
}
HUNYUAN_VIDEO_15 = {
    **HEADS,
    "in_channels": 9,
    "out_channels": 4,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "text_embed_2_dim": 12,
    "image_embed_dim": 10,
    "rope_axes_dim": (8, 12, 12),
}
COGVIDEOX = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 2 * COLUMNS,
    "sample_height": 2 * ROWS,
    "sample_frames": 4 * (FRAMES - 1) + 1,
    "patch_size": 2,
    "max_text_seq_length": 7,
}
CONSISID = {
    "is_train_face": True,
    "is_kps": False,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 16,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 16,
    "LFE_vit_dim": 16,
    "LFE_depth": 5,
    "LFE_dim_head": 16,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 5,
    "LFE_num_querie": 8,
    "LFE_output_dim": 42,
    "LFE_ff_mult": 2,
    "LFE_num_scale": 5,
}
LTX = {
    **HEADS,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 64,
    "num_layers": 2,
    "caption_channels": 16,
}
COSMOS = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 8,
    "max_size": (16, 64, 64),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": True,
}
EASYANIMATE = {
    **HEADS,
    "out_channels": 4,
    "patch_size": 2,
    "sample_width": 2 * COLUMNS,
    "sample_height": 2 * ROWS,
    "num_layers": 2,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "time_dim": 32,
    "model_dim": 64,
    "ff_dim": 64,
    "num_visual_blocks": 2,
    "axes_dims": (8, 12, 12),
}
KANDINSKY_TEXT = {"in_text_dim": 16, "in_text_dim2": 8, "num_text_blocks": 1}


def wan() -> Built:
    """Text by cross-attention; rotary tables sliced from buffers."""
    return diffusers.WanTransformer3DModel(**WAN), _ask_wan()


def wan22_ti2v() -> Built:
    """A timestep for each token: those of the given first frame are clean."""
    timestep = torch.full((1, TOKENS), 500)
    timestep[:, : ROWS * COLUMNS] = 0
    return diffusers.WanTransformer3DModel(**WAN), {**_ask_wan(), "timestep": timestep}


def wan_i2v() -> Built:
    """A second cross-attention, to the tokens of the first frame's CLIP embedding."""
    config = {**WAN, "in_channels": 8, "image_dim": 16, "added_kv_proj_dim": 64}
    return diffusers.WanTransformer3DModel(**config), _ask_wan_with_image(8)


def wan_vace() -> Built:
    """A control branch of blocks of its own, added to the main blocks."""
    model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=6)
    control = {
        "control_hidden_states": draw_video(6),
        "control_hidden_states_scale": torch.ones(1),
    }
    return model, {**_ask_wan(), **control}


def wan_animate() -> Built:
    """Poses added to the latents, whose first frame is a reference; faces by cross-attention."""
    model = diffusers.WanAnimateTransformer3DModel(
        **{**WAN, "in_channels": 12},
        latent_channels=4,
        image_dim=16,
        added_kv_proj_dim=64,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return model, {
        **_ask_wan_with_image(12, FRAMES + 1),
        "pose_hidden_states": draw_video(),
        "face_pixel_values": draw(1, 3, 4 * (FRAMES - 1) + 1, 16, 16),
    }


def chronoedit() -> Built:
    """A Wan with rotary positions of its own where there are two frames."""
    return diffusers.ChronoEditTransformer3DModel(**WAN), _ask_wan()


def anyflow() -> Built:
    """Frames before channels, and two timesteps for each frame."""
    model = diffusers.AnyFlowTransformer3DModel(**WAN)
    return model, {
        "hidden_states": draw(1, FRAMES, 4, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.full((1, FRAMES), 500),
        "r_timestep": torch.full((1, FRAMES), 400),
        "encoder_hidden_states": draw(1, 7, 16),
    }


def skyreels() -> Built:
    """A Wan by the code of another team."""
    return diffusers.SkyReelsV2Transformer3DModel(**WAN), _ask_wan()


def skyreels_df() -> Built:
    """Diffusion forcing: a timestep for each frame, and the frame rate."""
    model = diffusers.SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True)
    return model, {
        **_ask_wan(),
        "timestep": torch.full((1, FRAMES), 500),
        "enable_diffusion_forcing": True,
        "fps": torch.zeros(1, dtype=torch.long),
    }


def helios() -> Built:
    """Frames of the past, at three scales, stand before the frames that are made."""
    model = diffusers.HeliosTransformer3DModel(
        **{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, rope_dim=(8, 12, 12)
    )
    return model, {
        **_ask_wan(9),
        "indices_hidden_states": torch.arange(20, 20 + FRAMES)[None],
        "indices_latents_history_short": torch.arange(18, 20)[None],
        "indices_latents_history_mid": torch.arange(16, 18)[None],
        "indices_latents_history_long": torch.arange(16)[None],
        "latents_history_short": draw_video(frames=2),
        "latents_history_mid": draw_video(frames=2),
        "latents_history_long": draw_video(frames=16),
    }


def hunyuan_video() -> Built:
    """Double and single blocks over video then text, whose refiner masks by rows and columns."""
    return diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN_VIDEO), _ask_hunyuan_video()


def hunyuan_video_i2v() -> Built:
    """The first frame's tokens are modulated apart from the others."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HUNYUAN_VIDEO, image_condition_type="token_replace"
    )
    return model, _ask_hunyuan_video()


def hunyuan_video15() -> Built:
    """Two text encoders and a picture, cut to their valid tokens: graphs that break."""
    model = diffusers.HunyuanVideo15Transformer3DModel(**HUNYUAN_VIDEO_15)
    return model, {
        "hidden_states": draw(1, 9, FRAMES, ROWS, COLUMNS),
        "timestep": fill(500.0),
        **ask_by_two_encoders(),
        # all zeros mean that there is no picture
        "image_embeds": torch.zeros(1, 25, 10),
    }


def framepack() -> Built:
    """Frames of the past, at three scales, before the frames that are made; graphs that break."""
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN_VIDEO, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
    )
    return model, {
        **_ask_hunyuan_video(),
        "image_embeds": draw(1, 9, 10),
        "indices_latents": torch.arange(20, 20 + FRAMES),
        "latents_clean": draw_video(frames=2),
        "indices_latents_clean": torch.tensor([0, 19]),
        "latents_history_2x": draw_video(frames=2),
        "indices_latents_history_2x": torch.tensor([17, 18]),
        "latents_history_4x": draw_video(frames=16),
        "indices_latents_history_4x": torch.arange(1, 17),
    }


def motif() -> Built:
    """The single blocks at the end are a decoder: over the video twice, encoded and embedded."""
    model = diffusers.MotifVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=16,
        rope_axes_dim=(8, 12, 12),
    )
    return model, {
        "hidden_states": draw_video(),
        "timestep": fill(500),
        "encoder_hidden_states": draw(1, 30, 16),
        "encoder_attention_mask": mask_text(30),
    }


def cogvideox_rope() -> Built:
    """Text then video in one sequence; rotary tables are inputs."""
    model = diffusers.CogVideoXTransformer3DModel(
        **COGVIDEOX, use_rotary_positional_embeddings=True
    )
    return model, {**_ask_cogvideox(), "image_rotary_emb": _make_cogvideox_tables()}


def cogvideox_2b() -> Built:
    """Positions are added to the patches, no rotation."""
    return diffusers.CogVideoXTransformer3DModel(**COGVIDEOX), _ask_cogvideox()


def cogvideox15() -> Built:
    """Patches of two frames, by a linear layer instead of a convolution."""
    model = diffusers.CogVideoXTransformer3DModel(
        **COGVIDEOX,
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        patch_bias=False,
        ofs_embed_dim=16,
    )
    tables = embeddings.get_3d_rotary_pos_embed(
        32, None, (ROWS, COLUMNS), FRAMES, grid_type="slice", max_size=(ROWS, COLUMNS)
    )
    return model, {**_ask_cogvideox(2 * FRAMES), "ofs": fill(2.0), "image_rotary_emb": tables}


def consisid() -> Built:
    """A CogVideoX with a face: features of its own, read by cross-attention."""
    model = diffusers.ConsisIDTransformer3DModel(
        **COGVIDEOX, use_rotary_positional_embeddings=True, **CONSISID
    )
    return model, {
        **_ask_cogvideox(),
        "image_rotary_emb": _make_cogvideox_tables(),
        "id_cond": draw(1, 16),
        "id_vit_hidden": [draw(1, 9, 16) for _ in range(5)],
    }


def ltx() -> Built:
    """Packed latents; only the rotary tables tell the grid."""
    grid = {"num_frames": FRAMES, "height": ROWS, "width": COLUMNS}
    return diffusers.LTXVideoTransformer3DModel(**LTX), {**_ask_ltx(), **grid}


def ltx_coords() -> Built:
    """Packed latents whose coordinates are an input: nothing in the graph tells the grid."""
    axes = torch.meshgrid(
        torch.arange(FRAMES), torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij"
    )
    coordinates = torch.stack(axes).reshape(1, 3, TOKENS).float()
    model = diffusers.LTXVideoTransformer3DModel(**LTX)
    return model, {**_ask_ltx(), "video_coords": coordinates}


def ltx2() -> Built:
    """Video and audio, each with a self-attention, and cross-attention both ways."""
    model = diffusers.LTX2VideoTransformer3DModel(
        **LTX,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
    )
    return model, {
        "hidden_states": draw(1, TOKENS, 8),
        "audio_hidden_states": draw(1, 40, 8),
        "encoder_hidden_states": draw(1, 7, 16),
        "audio_encoder_hidden_states": draw(1, 7, 16),
        "timestep": fill(500),
        "encoder_attention_mask": torch.ones(1, 7),
        "audio_encoder_attention_mask": torch.ones(1, 7),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
        "audio_num_frames": 40,
        "fps": 24.0,
    }


def mochi() -> Built:
    """Cuts text to its valid tokens in a loop: Dynamo leaves all joint attention uncompiled."""
    return _make_mochi(), _ask_mochi(valid=16)


def mochi_masked() -> Built:
    """The same with padded text."""
    return _make_mochi(), _ask_mochi(valid=9)


def allegro() -> Built:
    """Rotary tables and the positions that pick from them are inputs."""
    return _make_allegro(), _ask_allegro()


def allegro_masked() -> Built:
    """A mask over the video's own pixels, pooled to its tokens."""
    mask = torch.ones(1, FRAMES, 2 * ROWS, 2 * COLUMNS)
    return _make_allegro(), {**_ask_allegro(), "attention_mask": mask}


def cosmos() -> Built:
    """A padding mask is one more channel; learned positions are added in each block."""
    return _make_cosmos(), _ask_cosmos()


def cosmos2() -> Built:
    """A timestep for each frame."""
    model = _make_cosmos(extra_pos_embed_type=None)
    return model, {**_ask_cosmos(), **_condition_frames(None)}


def cosmos25() -> Built:
    """A mask of the given frames is one more channel; text is projected first."""
    model = _make_cosmos(
        extra_pos_embed_type=None,
        in_channels=5,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=16,
        encoder_hidden_states_channels=16,
    )
    given = torch.ones(1, 1, FRAMES, 2 * ROWS, 2 * COLUMNS)
    return model, {**_ask_cosmos(), **_condition_frames(given)}


def easyanimate() -> Built:
    """Text then video; the rotary tables are made in the graph."""
    model = diffusers.EasyAnimateTransformer3DModel(**EASYANIMATE, in_channels=4, mmdit_layers=1)
    return model, _ask_easyanimate()


def easyanimate_inp() -> Built:
    """Latents to fill in are more channels; two text encoders in one sequence."""
    model = diffusers.EasyAnimateTransformer3DModel(
        **EASYANIMATE, in_channels=9, mmdit_layers=2, text_embed_dim_t5=12
    )
    return model, {
        **_ask_easyanimate(),
        "encoder_hidden_states_t5": draw(1, 11, 12),
        "inpaint_latents": draw_video(5),
    }


def latte() -> Built:
    """Spatial attention, frames in the batch, in turns with temporal attention of four tokens."""
    size = 2 * IMAGE_ROWS
    model = diffusers.LatteTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=size,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=16,
        video_length=4,
    )
    return model, {
        "hidden_states": draw(1, 4, 4, size, size),
        "timestep": fill(500),
        "encoder_hidden_states": draw(1, 9, 16),
    }


def sana_video() -> Built:
    """Linear attention over the video, softmax only to the text."""
    model = diffusers.SanaVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=16,
        sample_size=30,
        rope_max_seq_len=64,
    )
    return model, {
        "hidden_states": draw_video(),
        "encoder_hidden_states": draw(1, 9, 16),
        "timestep": fill(500),
        "encoder_attention_mask": torch.ones(1, 9),
    }


def kandinsky5() -> Built:
    """Channels last; text has self-attention of its own, and is read by cross-attention."""
    model = diffusers.Kandinsky5Transformer3DModel(
        **KANDINSKY, **KANDINSKY_TEXT, patch_size=(1, 2, 2)
    )
    return model, {
        **_ask_kandinsky(),
        "visual_rope_pos": [torch.arange(n) for n in (FRAMES, ROWS, COLUMNS)],
        "text_rope_pos": torch.arange(20),
    }


def kandinsky6() -> Built:
    """Video and audio, each with a self-attention, and cross-attention both ways."""
    model = diffusers.Kandinsky6Transformer3DModel(
        **KANDINSKY, **KANDINSKY_TEXT, visual_cond=False, in_audio_dim=4, out_audio_dim=4
    )
    return model, {**_ask_kandinsky(), "audio_hidden_states": draw(1, 30, 4)}


def kandinsky6_sr() -> Built:
    """flex_attention with a block mask made from its queries and keys; no text."""
    model = diffusers.Kandinsky6SRTransformer3DModel(**KANDINSKY)
    return model, {"hidden_states": draw(1, FRAMES, 16, 16, 9), "timestep": fill(500.0)}


VIDEO: tuple[Builder, ...] = (
    wan,
    wan22_ti2v,
    wan_i2v,
    wan_vace,
    wan_animate,
    chronoedit,
    anyflow,
    skyreels,
    skyreels_df,
    helios,
    hunyuan_video,
    hunyuan_video_i2v,
    hunyuan_video15,
    framepack,
    motif,
    cogvideox_rope,
    cogvideox_2b,
    cogvideox15,
    consisid,
    ltx,
    ltx_coords,
    ltx2,
    mochi,
    mochi_masked,
    allegro,
    allegro_masked,
    cosmos,
    cosmos2,
    cosmos25,
    easyanimate,
    easyanimate_inp,
    latte,
    sana_video,
    kandinsky5,
    kandinsky6,
    kandinsky6_sr,
)


def _ask_wan(text: int = 7) -> dict[str, Any]:
    return {
        "hidden_states": draw_video(),
        "timestep": fill(500),
        "encoder_hidden_states": draw(1, text, 16),
    }


def _ask_wan_with_image(channels: int, frames: int = FRAMES) -> dict[str, Any]:
    return {
        **_ask_wan(512),
        "hidden_states": draw_video(channels, frames),
        "encoder_hidden_states_image": draw(1, 257, 16),
    }


def _ask_hunyuan_video() -> dict[str, Any]:
    return {
        "hidden_states": draw_video(),
        "timestep": fill(500),
        "encoder_hidden_states": draw(1, 40, 16),
        "encoder_attention_mask": mask_text(40),
        "pooled_projections": draw(1, 8),
        "guidance": fill(6000.0),
    }


def _ask_cogvideox(frames: int = FRAMES) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, frames, 4, 2 * ROWS, 2 * COLUMNS),
        "timestep": fill(500),
        "encoder_hidden_states": draw(1, 7, 16),
    }


def _make_cogvideox_tables() -> tuple[torch.Tensor, torch.Tensor]:
    grid = (ROWS, COLUMNS)
    return embeddings.get_3d_rotary_pos_embed(32, ((0, 0), grid), grid, FRAMES)


def _ask_ltx() -> dict[str, Any]:
    return {
        "hidden_states": draw(1, TOKENS, 8),
        "encoder_hidden_states": draw(1, 7, 16),
        "timestep": fill(500),
        "encoder_attention_mask": torch.ones(1, 7).bool(),
    }


def _make_mochi() -> torch.nn.Module:
    return diffusers.MochiTransformer3DModel(
        **HEADS,
        patch_size=2,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=16,
    )


def _ask_mochi(valid: int) -> dict[str, Any]:
    return {
        "hidden_states": draw_video(),
        "encoder_hidden_states": draw(1, 16, 16),
        "timestep": fill(500),
        "encoder_attention_mask": mask_text(16, 16 - valid).bool(),
    }


def _make_allegro() -> torch.nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        # thirds of it are even: one for each axis
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=96,
        sample_height=2 * ROWS,
        sample_width=2 * COLUMNS,
        sample_frames=FRAMES,
        caption_channels=16,
    )


def _ask_allegro() -> dict[str, Any]:
    tables = embeddings.get_3d_rotary_pos_embed_allegro(
        embed_dim=48,
        crops_coords=((0, 0), (ROWS, COLUMNS)),
        grid_size=(ROWS, COLUMNS),
        temporal_size=FRAMES,
        interpolation_scale=(2.0, 2.0, 2.0),
        device="cpu",
    )
    axes = [torch.as_tensor(axis).long() for axis in tables[3:]]
    positions = torch.cartesian_prod(*axes).T.reshape(3, 1, TOKENS)
    return {
        "hidden_states": draw_video(),
        "encoder_hidden_states": draw(1, 9, 16),
        "timestep": fill(500),
        "encoder_attention_mask": torch.ones(1, 9),
        "image_rotary_emb": (tables[:3], tuple(positions)),
    }


def _make_cosmos(**config: Any) -> torch.nn.Module:
    if not is_torchvision_available():
        _stand_in_for_torchvision()
    return diffusers.CosmosTransformer3DModel(**{**COSMOS, **config})


def _stand_in_for_torchvision() -> None:
    """Cosmos scales its padding mask by `torchvision.transforms`, which it imports only if there.

    One function of it is called, and torch has that function, too: no reason to install it.
    """
    from diffusers.models.transformers import transformer_cosmos

    def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, size=size, mode=interpolation)

    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )


def _ask_cosmos() -> dict[str, Any]:
    return {
        "hidden_states": draw_video(),
        "timestep": fill(500),
        "encoder_hidden_states": draw(1, 9, 16),
        "fps": 16,
        "padding_mask": torch.zeros(1, 1, 2 * ROWS, 2 * COLUMNS),
    }


def _condition_frames(given: torch.Tensor | None) -> dict[str, Any]:
    return {"condition_mask": given, "timestep": torch.full((1, 1, FRAMES, 1, 1), 0.5)}


def _ask_easyanimate() -> dict[str, Any]:
    return {
        "hidden_states": draw_video(),
        "timestep": fill(500),
        "encoder_hidden_states": draw(1, 9, 16),
    }


def _ask_kandinsky() -> dict[str, Any]:
    return {
        "hidden_states": draw(1, FRAMES, 2 * ROWS, 2 * COLUMNS, 4),
        "encoder_hidden_states": draw(1, 20, 16),
        "timestep": fill(500.0),
        "pooled_projections": draw(1, 8),
    }
