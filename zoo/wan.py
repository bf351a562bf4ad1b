"""Wan and the video models that are made like it."""

from __future__ import annotations

import functools

from zoo.inputs import count, draw, draw_text, draw_video, fill, runs
from zoo.record import HEADS, ROPE, TOKENS, B, H, Model, T, W

model = functools.partial(Model, grid=(5, 13, 17))

# Tables: several entries on a line are easier to read than one.
# fmt: off
WAN_INPUTS = dict(hidden_states=draw_video(), timestep=fill(500),
    encoder_hidden_states=draw_text(7))
PICTURE_INPUTS = dict(encoder_hidden_states=draw_text(512),
    encoder_hidden_states_image=draw_text(257))
WAN_CORE = dict(HEADS, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64,
    num_layers=2)
WAN = dict(WAN_CORE, rope_max_seq_len=64)
PICTURE = dict(image_dim=16, added_kv_proj_dim=64)

WANS = (
    model("wan", "WanTransformer3DModel",
        "Text by cross-attention; rotary tables sliced from buffers.",
        WAN, WAN_INPUTS),
    model("wan22_ti2v", "WanTransformer3DModel",
        "A timestep for each token: those of the given first frame are clean.",
        WAN, dict(WAN_INPUTS, timestep=runs((0, H * W), (500, TOKENS - H * W)))),
    model("wan_i2v", "WanTransformer3DModel",
        "A second cross-attention, to the tokens of the first frame's CLIP embedding.",
        dict(WAN, in_channels=8, **PICTURE),
        dict(WAN_INPUTS, hidden_states=draw_video(8), **PICTURE_INPUTS)),
    model("wan_vace", "WanVACETransformer3DModel",
        "A control branch of blocks of its own, added to the main blocks.",
        dict(WAN, vace_layers=[0], vace_in_channels=6),
        dict(WAN_INPUTS, control_hidden_states=draw_video(6),
            control_hidden_states_scale=fill(1.0, 1))),
    model("wan_animate", "WanAnimateTransformer3DModel",
        "Poses added to the latents, whose first frame is a reference; faces by cross-attention.",
        dict(WAN, in_channels=12, latent_channels=4, **PICTURE,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16,
            motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
            face_encoder_num_heads=2, inject_face_latents_blocks=2),
        dict(WAN_INPUTS, hidden_states=draw_video(12, T + 1), **PICTURE_INPUTS,
            pose_hidden_states=draw_video(),
            face_pixel_values=draw(B, 3, 4 * (T - 1) + 1, 16, 16))),
    model("chronoedit", "ChronoEditTransformer3DModel",
        "A Wan with rotary positions of its own where there are two frames.",
        WAN, WAN_INPUTS),
    model("anyflow", "AnyFlowTransformer3DModel",
        "Frames before channels, and two timesteps for each frame.",
        WAN,
        dict(WAN_INPUTS, hidden_states=draw(B, T, 4, 2 * H, 2 * W), timestep=fill(500, B, T),
            r_timestep=fill(400, B, T))),
    model("skyreels", "SkyReelsV2Transformer3DModel",
        "A Wan by the code of another team.",
        WAN, WAN_INPUTS),
    model("skyreels_df", "SkyReelsV2Transformer3DModel",
        "Diffusion forcing: a timestep for each frame, and the frame rate.",
        dict(WAN, inject_sample_info=True),
        dict(WAN_INPUTS, timestep=fill(500, B, T), enable_diffusion_forcing=True, fps=fill(0))),
    model("helios", "HeliosTransformer3DModel",
        "Frames of the past, at three scales, stand before the frames that are made.",
        dict(WAN_CORE, rope_dim=ROPE),
        dict(WAN_INPUTS, encoder_hidden_states=draw_text(9),
            indices_hidden_states=count(20, 20 + T, B),
            indices_latents_history_short=count(18, 20, B),
            indices_latents_history_mid=count(16, 18, B),
            indices_latents_history_long=count(0, 16, B),
            latents_history_short=draw_video(frames=2), latents_history_mid=draw_video(frames=2),
            latents_history_long=draw_video(frames=16))),
)
