"""Image models that take packed latents `[B, H * W, C]`: Flux, Qwen and their kin."""

from __future__ import annotations

import functools

import torch

from zoo.inputs import call, deferred, draw, draw_text, fill, mask, number_positions, runs
from zoo.record import HEADS, ROPE, TEXT, TOKENS, B, D, H, Model, T, W

model = functools.partial(Model, grid=(1, 33, 35))


@deferred
def number_text(tokens: int) -> torch.Tensor:
    """Ids `[1, tokens, 4]` of text, counted on the last axis."""
    return torch.arange(tokens)[None, :, None] * torch.tensor([0, 0, 0, 1])


# Tables: several entries on a line are easier to read than one.
# fmt: off
PACKED = dict(hidden_states=draw(B, TOKENS, 8), timestep=fill(0.5),
    encoder_hidden_states=draw_text())
NUMBERED = dict(PACKED, img_ids=number_positions(T, H, W), txt_ids=fill(0.0, TEXT, 3))
FLUX_INPUTS = dict(NUMBERED, pooled_projections=draw(B, 8), guidance=fill(3.5))
FLUX2_INPUTS = dict(PACKED, img_ids=number_positions(T, H, W, 1, axes=4, step=10, dtype=torch.long),
    txt_ids=number_text(TEXT), guidance=fill(4.0))
CHROMA_PADDED = ((True, TEXT - 10), (False, 10), (True, TOKENS))
QWEN_INPUTS = dict(PACKED, encoder_hidden_states_mask=mask(B, TEXT), img_shapes=[[(T, H, W)]])

FLUX_KIN = dict(HEADS, in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=16,
    axes_dims_rope=ROPE)
POOLED = dict(FLUX_KIN, pooled_projection_dim=8)
FLUX = dict(POOLED, guidance_embeds=True)
FOUR_AXES = dict(FLUX_KIN, axes_dims_rope=(D / 4,) * 4)
FLUX2 = dict(FOUR_AXES, timestep_guidance_channels=16)
CHROMA = dict(FLUX_KIN, approximator_num_channels=16, approximator_hidden_dim=32,
    approximator_layers=1)
QWEN = dict(HEADS, patch_size=2, in_channels=8, out_channels=2, num_layers=2,
    joint_attention_dim=16, axes_dims_rope=ROPE)
GROUPED = dict(num_attention_heads=4, num_key_value_heads=2, attention_head_dim=D)

PACKED_IMAGES = (
    model("flux", "FluxTransformer2DModel",
        "Packed latents; positions are an input, so nothing in the graph tells the grid.",
        FLUX, FLUX_INPUTS),
    model("flux_kontext", "FluxTransformer2DModel",
        "A second picture to edit after the latents, told apart by its positions.",
        FLUX, FLUX_INPUTS, grid=(2, 33, 35)),
    model("flux2", "Flux2Transformer2DModel",
        "Positions of four axes; one modulation for all blocks.",
        FLUX2, FLUX2_INPUTS),
    model("flux2_edit", "Flux2Transformer2DModel",
        "A picture to edit after the latents, told apart by its positions.",
        FLUX2, FLUX2_INPUTS, grid=(2, 33, 35)),
    model("flux3", "Flux3Transformer2DModel",
        "Text is refined by itself before it joins the latents; no pooled text.",
        dict(FOUR_AXES, cond_in_channels=8, timestep_channels=16),
        dict(PACKED, img_ids=number_positions(T, H, W, axes=4, dtype=torch.long),
            txt_ids=fill(0, TEXT, 4))),
    model("chroma", "ChromaTransformer2DModel",
        "A Flux that adds the product of a mask of numbers with itself, as its pipeline gives it.",
        CHROMA, dict(NUMBERED, attention_mask=runs(*((float(v), n) for v, n in CHROMA_PADDED)))),
    model("chroma_boolean", "ChromaTransformer2DModel",
        "A Flux whose padded text is masked for queries and keys by a product of masks.",
        CHROMA, dict(NUMBERED, attention_mask=runs(*CHROMA_PADDED))),
    model("bria", "BriaTransformer2DModel",
        "A Flux without pooled text.",
        POOLED, dict(NUMBERED, timestep=fill(500.0), attention_kwargs={})),
    model("bria_fibo", "BriaFiboTransformer2DModel",
        "Features of every layer of the text encoder, and a mask of all queries and keys.",
        dict(FLUX_KIN, text_encoder_dim=12),
        dict(NUMBERED, timestep=fill(500.0), text_encoder_layers=[draw_text(TEXT, 12)] * 2,
            joint_attention_kwargs={
                "attention_mask": fill(0.0, B, 1, TEXT + TOKENS, TEXT + TOKENS)})),
    model("ovis", "OvisImageTransformer2DModel",
        "A Flux with gated feed-forward layers and no pooled text.",
        dict(FLUX_KIN, out_channels=8), NUMBERED),
    model("longcat", "LongCatImageTransformer2DModel",
        "A Flux without guidance and pooled text.",
        POOLED, NUMBERED),
    model("qwen", "QwenImageTransformer2DModel",
        "Packed latents; rotary tables by picture; a mask of the padded text.",
        QWEN, QWEN_INPUTS),
    model("qwen_nomask", "QwenImageTransformer2DModel",
        "Text without a mask.",
        QWEN, dict(QWEN_INPUTS, encoder_hidden_states_mask=None)),
    model("qwen_edit", "QwenImageTransformer2DModel",
        "A picture to edit, of the same size, after the latents.",
        QWEN, dict(QWEN_INPUTS, img_shapes=[[(1, H, W)] * 2]), grid=(2, 33, 35)),
    model("qwen_edit_plus", "QwenImageTransformer2DModel",
        "A picture of another size after the latents, and modulated as clean.",
        dict(QWEN, zero_cond_t=True),
        dict(QWEN_INPUTS, hidden_states=draw(B, TOKENS + 31 * 29, 8),
            img_shapes=[[(1, H, W), (1, 31, 29)]])),
    model("qwen_layered", "QwenImageTransformer2DModel",
        "Four pictures, one for each layer, with rotary positions for the layer.",
        dict(QWEN, use_layer3d_rope=True, use_additional_t_cond=True),
        dict(QWEN_INPUTS, img_shapes=[[(1, H, W)] * 4], additional_t_cond=fill(0)),
        grid=(4, 17, 19)),
    # A slot of the text encoder stands for four tokens.
    model("qwen21", "QwenImage21Transformer2DModel",
        "Causal attention from picture to picture, in one call for each; text takes its slots.",
        dict(HEADS, in_channels=8, out_channels=8, num_layers=2, context_in_dim=16,
            axes_dims_rope=ROPE),
        dict(PACKED, img_shapes=[[(1, H, W)]], img_mask=runs((False, TEXT), (True, H * W / 4))),
        grid=(1, 32, 36)),
    model("krea2", "Krea2Transformer2DModel",
        "Text of several layers is fused and refined by itself; grouped keys; positions as input.",
        dict(GROUPED, in_channels=8, num_layers=2, intermediate_size=64, timestep_embed_dim=16,
            text_hidden_dim=32, num_text_layers=2, text_num_attention_heads=2,
            text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1, axes_dims_rope=ROPE),
        dict(PACKED, encoder_hidden_states=draw(B, TEXT, 2, 32),
            position_ids=call(torch.cat, [fill(0.0, TEXT, 3), number_positions(T, H, W)]))),
    model("nucleus", "NucleusMoEImageTransformer2DModel",
        "Queries of the latents alone; keys of latents and text, grouped.",
        dict(GROUPED, patch_size=2, in_channels=8, out_channels=2, num_layers=2,
            joint_attention_dim=16, axes_dims_rope=ROPE, moe_enabled=False),
        dict(PACKED, img_shapes=[(T, H, W)], encoder_hidden_states_mask=mask(B, TEXT))),
)
