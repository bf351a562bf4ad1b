"""Image models that take latents `[B, C, 2 * H, 2 * W]` and make patches of them."""

from __future__ import annotations

import functools

import torch

from zoo.images_packed import PACKED_IMAGES
from zoo.inputs import (
    TWO_ENCODERS,
    call,
    count,
    deferred,
    draw,
    draw_image,
    draw_text,
    fill,
    mask,
)
from zoo.record import HEADS, ROPE, TEXT, TOKENS, B, D, H, Model, T, W

model = functools.partial(Model, grid=(1, 33, 35))
# Tokens of a language model that makes pictures.
PROMPT = 20


@deferred
def read_causally(text: int, tokens: int) -> torch.Tensor:
    """A mask `[1, tokens, tokens]`: text sees what is before it, the picture sees all."""
    seen = torch.tril(torch.ones(1, tokens, tokens, dtype=torch.long))
    seen[:, text:, text:] = 1
    return seen


# Tables: several entries on a line are easier to read than one.
# fmt: off
LATENTS = dict(hidden_states=draw_image(), timestep=fill(500),
    encoder_hidden_states=draw_text())
HALFWAY = dict(LATENTS, timestep=fill(0.5))
SIZE = dict(target_size=fill(64.0, 1, 2), crop_coords=fill(0.0, 1, 2))
COGVIEW_INPUTS = dict(LATENTS, **SIZE, original_size=fill(64.0, 1, 2))
HIDREAM_INPUTS = dict(hidden_states=draw_image(), timesteps=fill(500),
    encoder_hidden_states_t5=draw_text(20), encoder_hidden_states_llama3=draw(2, B, 20, 12),
    pooled_embeds=draw(B, 8))
PICTURE = draw(4, 1, 2 * H, 2 * W)

SAME_CHANNELS = dict(in_channels=4, out_channels=4)
COGVIEW = dict(HEADS, **SAME_CHANNELS, num_layers=2, text_embed_dim=16, time_embed_dim=16,
    condition_dim=8)
LUMINA2 = dict(sample_size=64, patch_size=2, in_channels=4, hidden_size=96, num_layers=2,
    num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
    axes_dim_rope=(8, 12, 12), axes_lens=(128, 64, 64), cap_feat_dim=16)
HIDREAM = dict(HEADS, **SAME_CHANNELS, patch_size=2, num_layers=1, num_single_layers=1,
    caption_channels=[16, 12], text_emb_dim=8, num_routed_experts=2, num_activated_experts=1,
    axes_dims_rope=(16, 8, 8), max_resolution=(80, 80), llama_layers=[0, 1],
    force_inference_output=True)
Z_IMAGE = dict(in_channels=4, dim=2 * D, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    cap_feat_dim=16, axes_dims=list(ROPE), axes_lens=[1024, 64, 64])

IMAGES = (
    *PACKED_IMAGES,
    # Text for the gist, and for the one injection layer.
    model("bria_fibo2", "BriaFibo2Transformer2DModel",
        "Learned gist tokens read the text; they and the latents are modulated apart.",
        dict(in_channels=4, patch_size=2, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2,
            cap_feat_dim=16, injection_layer_ids=(1,), perceiver_num_layers=1,
            min_num_gist_tokens=8, max_num_gist_tokens=8, gist_step=8, gist_min_text_len=8,
            gist_max_text_len=64, axes_dims=ROPE, axes_lens=(2048, 64, 64)),
        dict(HALFWAY, encoder_hidden_states=draw(B, 2, TEXT, 16))),
    model("hunyuan_image", "HunyuanImageTransformer2DModel",
        "Two text encoders, cut to their valid tokens: graphs that break.",
        dict(HEADS, **SAME_CHANNELS, num_layers=1, num_single_layers=1, num_refiner_layers=1,
            text_embed_dim=16, text_embed_2_dim=12, rope_axes_dim=(16, 16), guidance_embeds=False),
        {"hidden_states": draw(B, 4, H, W), "timestep": fill(500.0), **TWO_ENCODERS}),
    model("hunyuan_dit", "HunyuanDiT2DModel",
        "Two text encoders by cross-attention, skips, pooling by nn.MultiheadAttention's function.",
        dict(HEADS, in_channels=4, patch_size=2, activation_fn="gelu-approximate",
            sample_size=2 * H, hidden_size=64, num_layers=2, cross_attention_dim=16,
            cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=7, text_len_t5=9),
        dict(hidden_states=draw_image(), timestep=fill(500.0), encoder_hidden_states=draw_text(7),
            text_embedding_mask=fill(1.0, B, 7), encoder_hidden_states_t5=draw_text(9),
            text_embedding_mask_t5=fill(1.0, B, 9), image_meta_size=fill(1.0, B, 6), style=fill(0),
            image_rotary_emb=call("diffusers.models.embeddings:get_2d_rotary_pos_embed", 32,
                ((0, 0), (H, W)), (H, W), output_type="pt"))),
    model("sd3", "SD3Transformer2DModel",
        "Joint attention, and a second one over the latents alone in one block; no rotation.",
        dict(HEADS, **SAME_CHANNELS, sample_size=80, patch_size=2, num_layers=2,
            joint_attention_dim=16, caption_projection_dim=2 * D, pooled_projection_dim=8,
            pos_embed_max_size=40, dual_attention_layers=(0,), qk_norm="rms_norm"),
        dict(LATENTS, pooled_projections=draw(B, 8))),
    model("auraflow", "AuraFlowTransformer2DModel",
        "Register tokens before the text; positions picked from a table by index.",
        dict(HEADS, **SAME_CHANNELS, sample_size=64, patch_size=2, num_mmdit_layers=1,
            num_single_dit_layers=1, joint_attention_dim=16, caption_projection_dim=64,
            pos_embed_max_size=40 * 40), HALFWAY),
    model("pixart", "PixArtTransformer2DModel",
        "Text by cross-attention; no rotation.",
        dict(HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64,
            sample_size=2 * H, caption_channels=16, use_additional_conditions=False),
        dict(LATENTS, encoder_hidden_states=draw_text(9), encoder_attention_mask=fill(1.0, B, 9),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None})),
    model("sana", "SanaTransformer2DModel",
        "Linear attention over the latents, softmax only to the text.",
        dict(HEADS, **SAME_CHANNELS, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=16,
            sample_size=32),
        dict(LATENTS, hidden_states=draw(B, 4, H, W), encoder_hidden_states=draw_text(9),
            encoder_attention_mask=fill(1.0, B, 9))),
    model("lumina2", "Lumina2Transformer2DModel",
        "Samples are padded in a loop over their lengths; grouped keys; text without padding.",
        LUMINA2, dict(HALFWAY, encoder_attention_mask=mask(B, TEXT, 0, dtype=torch.bool))),
    model("lumina2_ragged", "Lumina2Transformer2DModel",
        "The same with padded text.",
        LUMINA2, dict(HALFWAY, encoder_attention_mask=mask(B, TEXT, 15, dtype=torch.bool))),
    model("lumina_next", "LuminaNextDiT2DModel",
        "Text by a gated cross-attention beside the self-attention; grouped keys.",
        dict(sample_size=64, in_channels=4, hidden_size=64, num_layers=2, num_attention_heads=2,
            num_kv_heads=1, multiple_of=16, cross_attention_dim=16),
        dict(HALFWAY, encoder_hidden_states=draw_text(9), encoder_mask=fill(1.0, B, 9),
            image_rotary_emb=call("diffusers.models.embeddings:get_2d_rotary_pos_embed_lumina", 32,
                384, 384), cross_attention_kwargs={})),
    model("hidream", "HiDreamImageTransformer2DModel",
        "Experts; a square picture, patched in the graph.",
        HIDREAM, HIDREAM_INPUTS, grid=(1, 36, 36)),
    model("hidream_rect", "HiDreamImageTransformer2DModel",
        "A picture that is no square: its tokens are padded to the most there may be.",
        HIDREAM, HIDREAM_INPUTS, grid=(1, 32, 40)),
    # One token of the timestep stands between text and picture.
    model("omnigen", "OmniGenTransformer2DModel",
        "A language model: text is causal, the picture sees all, by a mask of queries and keys.",
        dict(in_channels=4, patch_size=2, hidden_size=64, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=64, num_layers=2, pad_token_id=0,
            vocab_size=100, max_position_embeddings=4096, original_max_position_embeddings=4096,
            rope_scaling={"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
            pos_embed_max_size=64, time_step_dim=16),
        dict(hidden_states=draw_image(), timestep=fill(0.5), input_ids=count(1, PROMPT + 1, B),
            input_img_latents=[], input_image_sizes={},
            attention_mask=read_causally(PROMPT + 1, PROMPT + 1 + TOKENS),
            position_ids=count(0, PROMPT + 1 + TOKENS, B))),
    model("zimage", "ZImageTransformer2DModel",
        "Lists of samples, padded together; refiners of picture and text before they join.",
        Z_IMAGE, {"x": [PICTURE], "t": fill(0.5), "cap_feats": [draw(TEXT, 16)]}),
    model("zimage_ragged", "ZImageTransformer2DModel",
        "Two samples whose captions differ in length.",
        Z_IMAGE,
        {"x": [PICTURE] * 2, "t": fill(0.5, 2), "cap_feats": [draw(40, 16), draw(90, 16)]}),
    model("cogview3", "CogView3PlusTransformer2DModel",
        "Text then latents; positions are added to the patches.",
        dict(COGVIEW, pos_embed_max_size=40, sample_size=64), COGVIEW_INPUTS),
    model("cogview4", "CogView4Transformer2DModel",
        "Text then latents; rotary tables are made in the graph.",
        dict(COGVIEW, pos_embed_max_size=40, sample_size=64, rope_axes_dim=(64, 64)),
        COGVIEW_INPUTS),
    model("glm", "GlmImageTransformer2DModel",
        "Tokens of a language model are added to the patches.",
        dict(COGVIEW, prior_vq_quantizer_codebook_size=64),
        dict(LATENTS, **SIZE, prior_token_id=fill(0, B, TOKENS), prior_token_drop=fill(False))),
    model("dit", "DiTTransformer2DModel",
        "Classes instead of text; positions are added to the patches of a square picture.",
        dict(HEADS, in_channels=4, num_layers=2, sample_size=2 * H, num_embeds_ada_norm=10),
        dict(hidden_states=draw_image(), timestep=fill(500), class_labels=count(0, B)),
        grid=(1, 33, 33)),
    model("prx", "PRXTransformer2DModel",
        "Queries of the latents alone; keys of text and latents.",
        dict(in_channels=4, context_in_dim=16, hidden_size=64, num_heads=2, depth=2,
            axes_dim=[16, 16]), dict(HALFWAY, attention_mask=mask(B, TEXT))),
    model("ernie", "ErnieImageTransformer2DModel",
        "Latents then text in one sequence, sequence before batch.",
        dict(SAME_CHANNELS, hidden_size=64, num_attention_heads=2, num_layers=2, ffn_hidden_size=64,
            text_in_dim=16, rope_axes_dim=ROPE),
        dict(hidden_states=draw(B, 4, H, W), timestep=fill(500), text_bth=draw_text(),
            text_lens=fill(TEXT))),
    model("joyimage", "JoyImageEditTransformer3DModel",
        "Two pictures, the second to be edited, as frames of a video.",
        dict(in_channels=4, hidden_size=64, num_attention_heads=2, text_dim=16, num_layers=2,
            rope_dim_list=list(ROPE)), dict(LATENTS, hidden_states=draw(B, 4, T, 2 * H, 2 * W)),
        grid=(2, 33, 35)),
)
