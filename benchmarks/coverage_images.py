"""Tiny diffusers image models with inputs, for `benchmarks.coverage`.

Classes are looked up inside of the builders: one that an older diffusers lacks fails alone.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models import embeddings

from benchmarks.coverage_models import (
    IMAGE_COLUMNS,
    IMAGE_ROWS,
    IMAGE_TOKENS,
    Builder,
    Built,
    ask_by_two_encoders,
    draw,
    draw_image,
    fill,
    mask_text,
    number_positions,
)

TEXT = 40
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
FLUX = {
    **HEADS,
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}
FLUX2 = {**FLUX, "axes_dims_rope": (8, 8, 8, 8)}
QWEN = {
    **HEADS,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}
SANA = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 16,
}
COGVIEW = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 8,
}


def flux() -> Built:
    """Packed latents; positions are an input, so nothing in the graph tells the grid."""
    return _make_flux(), _ask_flux()


def flux_kontext() -> Built:
    """A second picture to edit after the latents, told apart by its positions."""
    positions = [number_positions(IMAGE_ROWS, IMAGE_COLUMNS, picture=i) for i in range(2)]
    pictures = {"hidden_states": draw(1, 2 * IMAGE_TOKENS, 8), "img_ids": torch.cat(positions)}
    return _make_flux(), {**_ask_flux(), **pictures}


def flux2() -> Built:
    """Positions of four axes; one modulation for all blocks."""
    return _make_flux2(), _ask_flux2()


def flux2_edit() -> Built:
    """A picture to edit after the latents, told apart by its positions."""
    positions = [_number_by_four_axes(picture) for picture in (0, 10)]
    pictures = {
        "hidden_states": draw(1, 2 * IMAGE_TOKENS, 8),
        "img_ids": torch.cat(positions)[None],
    }
    return _make_flux2(), {**_ask_flux2(), **pictures}


def flux3() -> Built:
    """Text is refined by itself before it joins the latents; no pooled text."""
    model = diffusers.Flux3Transformer2DModel(**FLUX2, cond_in_channels=8, timestep_channels=16)
    return model, {
        **_ask_packed(),
        "img_ids": _number_by_four_axes(),
        "txt_ids": torch.zeros(TEXT, 4, dtype=torch.long),
    }


def chroma() -> Built:
    """A Flux that adds the product of a mask of numbers with itself, as its pipeline gives it."""
    model, inputs = chroma_boolean()
    return model, {**inputs, "attention_mask": inputs["attention_mask"].float()}


def chroma_boolean() -> Built:
    """A Flux whose padded text is masked for queries and keys by a product of masks."""
    model = diffusers.ChromaTransformer2DModel(
        **FLUX, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1
    )
    mask = torch.ones(1, TEXT + IMAGE_TOKENS).bool()
    mask[:, TEXT - 10 : TEXT] = False
    return model, {**_ask_packed(), **_number_packed(), "attention_mask": mask}


def bria() -> Built:
    """A Flux without pooled text."""
    model = diffusers.BriaTransformer2DModel(**FLUX, pooled_projection_dim=8)
    return model, {**_ask_packed(500.0), **_number_packed(), "attention_kwargs": {}}


def bria_fibo() -> Built:
    """Features of every layer of the text encoder, and a mask of all queries and keys."""
    model = diffusers.BriaFiboTransformer2DModel(**FLUX, text_encoder_dim=12)
    tokens = TEXT + IMAGE_TOKENS
    return model, {
        **_ask_packed(500.0),
        **_number_packed(),
        "text_encoder_layers": [draw(1, TEXT, 12) for _ in range(2)],
        "joint_attention_kwargs": {"attention_mask": torch.zeros(1, 1, tokens, tokens)},
    }


def bria_fibo2() -> Built:
    """Learned gist tokens read the text; they and the latents are modulated apart."""
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=8,
        max_num_gist_tokens=8,
        gist_step=8,
        gist_min_text_len=8,
        gist_max_text_len=64,
        axes_dims=(8, 12, 12),
        axes_lens=(2048, 64, 64),
    )
    return model, {
        "hidden_states": draw_image(),
        "timestep": fill(0.5),
        # the gist's text and that of the one injection layer
        "encoder_hidden_states": draw(1, 2, TEXT, 16),
    }


def ovis() -> Built:
    """A Flux with gated feed-forward layers and no pooled text."""
    model = diffusers.OvisImageTransformer2DModel(**FLUX, out_channels=8)
    return model, {**_ask_packed(), **_number_packed()}


def longcat() -> Built:
    """A Flux without guidance and pooled text."""
    model = diffusers.LongCatImageTransformer2DModel(**FLUX, pooled_projection_dim=8)
    return model, {**_ask_packed(), **_number_packed()}


def qwen() -> Built:
    """Packed latents; rotary tables by picture; a mask of the padded text."""
    return diffusers.QwenImageTransformer2DModel(**QWEN), _ask_qwen()


def qwen_nomask() -> Built:
    """The same without a mask."""
    inputs = {**_ask_qwen(), "encoder_hidden_states_mask": None}
    return diffusers.QwenImageTransformer2DModel(**QWEN), inputs


def qwen_edit() -> Built:
    """A picture to edit, of the same size, after the latents."""
    shapes = [(1, IMAGE_ROWS, IMAGE_COLUMNS)] * 2
    return diffusers.QwenImageTransformer2DModel(**QWEN), _ask_qwen(shapes)


def qwen_edit_plus() -> Built:
    """A picture of another size after the latents, and modulated as clean."""
    shapes = [(1, IMAGE_ROWS, IMAGE_COLUMNS), (1, 31, 29)]
    return diffusers.QwenImageTransformer2DModel(**QWEN, zero_cond_t=True), _ask_qwen(shapes)


def qwen_layered() -> Built:
    """Four pictures, one for each layer, with rotary positions for the layer."""
    model = diffusers.QwenImageTransformer2DModel(
        **QWEN, use_layer3d_rope=True, use_additional_t_cond=True
    )
    condition = torch.zeros(1, dtype=torch.long)
    return model, {**_ask_qwen([(1, 17, 19)] * 4), "additional_t_cond": condition}


def qwen21() -> Built:
    """Causal attention from picture to picture, in one call for each; text takes its slots."""
    model = diffusers.QwenImage21Transformer2DModel(
        **HEADS,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        context_in_dim=16,
        axes_dims_rope=(8, 12, 12),
    )
    rows, columns = 32, 36
    # a slot of the text encoder stands for four tokens
    slots = torch.cat([torch.zeros(1, TEXT), torch.ones(1, rows * columns // 4)], dim=1).bool()
    return model, {
        "hidden_states": draw(1, rows * columns, 8),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": fill(0.5),
        "img_shapes": [[(1, rows, columns)]],
        "img_mask": slots,
    }


def hunyuan_image() -> Built:
    """Two text encoders, cut to their valid tokens: graphs that break."""
    model = diffusers.HunyuanImageTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        rope_axes_dim=(16, 16),
        guidance_embeds=False,
    )
    return model, {
        "hidden_states": draw(1, 4, IMAGE_ROWS, IMAGE_COLUMNS),
        "timestep": fill(500.0),
        **ask_by_two_encoders(),
    }


def hunyuan_dit() -> Built:
    """Two text encoders by cross-attention, skips, pooling by nn.MultiheadAttention's function."""
    model = diffusers.HunyuanDiT2DModel(
        **HEADS,
        in_channels=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        sample_size=2 * IMAGE_ROWS,
        hidden_size=64,
        num_layers=2,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=7,
        text_len_t5=9,
    )
    grid = (IMAGE_ROWS, IMAGE_COLUMNS)
    tables = embeddings.get_2d_rotary_pos_embed(32, ((0, 0), grid), grid, output_type="pt")
    return model, {
        "hidden_states": draw_image(),
        "timestep": fill(500.0),
        "encoder_hidden_states": draw(1, 7, 16),
        "text_embedding_mask": torch.ones(1, 7),
        "encoder_hidden_states_t5": draw(1, 9, 16),
        "text_embedding_mask_t5": torch.ones(1, 9),
        "image_meta_size": torch.ones(1, 6),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": tables,
    }


def sd3() -> Built:
    """Joint attention, and a second one over the latents alone in one block; no rotation."""
    model = diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=80,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=16,
        caption_projection_dim=64,
        pooled_projection_dim=8,
        pos_embed_max_size=40,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {**_ask_image(), "pooled_projections": draw(1, 8)}


def auraflow() -> Built:
    """Register tokens before the text; positions picked from a table by index."""
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=64,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=16,
        caption_projection_dim=64,
        pos_embed_max_size=40 * 40,
    )
    return model, _ask_image(0.5)


def pixart() -> Built:
    """Text by cross-attention; no rotation."""
    model = diffusers.PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=2 * IMAGE_ROWS,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return model, {
        **_ask_image(text=9),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.ones(1, 9),
    }


def sana() -> Built:
    """Linear attention over the latents, softmax only to the text."""
    model = diffusers.SanaTransformer2DModel(**SANA, sample_size=32)
    return model, {
        **_ask_image(text=9),
        "hidden_states": draw(1, 4, IMAGE_ROWS, IMAGE_COLUMNS),
        "encoder_attention_mask": torch.ones(1, 9),
    }


def lumina2() -> Built:
    """Samples are padded in a loop over their lengths; grouped keys; text without padding."""
    return _make_lumina2(), _ask_lumina2(padded=0)


def lumina2_ragged() -> Built:
    """The same with padded text."""
    return _make_lumina2(), _ask_lumina2(padded=15)


def lumina_next() -> Built:
    """Text by a gated cross-attention beside the self-attention; grouped keys."""
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=64,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return model, {
        **_ask_image(0.5, text=9),
        "encoder_mask": torch.ones(1, 9),
        "image_rotary_emb": embeddings.get_2d_rotary_pos_embed_lumina(32, 384, 384),
        "cross_attention_kwargs": {},
    }


def hidream() -> Built:
    """Experts; a square picture, patched in the graph."""
    return _make_hidream(), _ask_hidream(72, 72)


def hidream_rect() -> Built:
    """A picture that is no square: its tokens are padded to the most there may be."""
    return _make_hidream(), _ask_hidream(64, 80)


def omnigen() -> Built:
    """A language model: text is causal, the picture sees all, by a mask of queries and keys."""
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        num_layers=2,
        pad_token_id=0,
        vocab_size=100,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rope_scaling={"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        pos_embed_max_size=64,
        time_step_dim=16,
    )
    # text, the timestep's token, the picture
    text = 20
    tokens = text + 1 + IMAGE_TOKENS
    mask = torch.tril(torch.ones(1, tokens, tokens))
    mask[:, text + 1 :, text + 1 :] = 1
    return model, {
        "hidden_states": draw_image(),
        "timestep": fill(0.5),
        "input_ids": torch.arange(1, text + 1)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.long(),
        "position_ids": torch.arange(tokens)[None],
    }


def zimage() -> Built:
    """Lists of samples, padded together; refiners of picture and text before they join."""
    return _make_zimage(), _ask_zimage(40)


def zimage_ragged() -> Built:
    """Two samples whose captions differ in length."""
    return _make_zimage(), _ask_zimage(40, 90)


def cogview3() -> Built:
    """Text then latents; positions are added to the patches."""
    model = diffusers.CogView3PlusTransformer2DModel(
        **COGVIEW, pos_embed_max_size=40, sample_size=64
    )
    return model, {**_ask_image(), **_describe_size(), "original_size": torch.full((1, 2), 64.0)}


def cogview4() -> Built:
    """Text then latents; rotary tables are made in the graph."""
    model = diffusers.CogView4Transformer2DModel(
        **COGVIEW, pos_embed_max_size=40, sample_size=64, rope_axes_dim=(64, 64)
    )
    return model, {**_ask_image(), **_describe_size(), "original_size": torch.full((1, 2), 64.0)}


def glm() -> Built:
    """Tokens of a language model are added to the patches."""
    model = diffusers.GlmImageTransformer2DModel(**COGVIEW, prior_vq_quantizer_codebook_size=64)
    return model, {
        **_ask_image(),
        **_describe_size(),
        "prior_token_id": torch.zeros(1, IMAGE_TOKENS, dtype=torch.long),
        "prior_token_drop": torch.zeros(1, dtype=torch.bool),
    }


def dit() -> Built:
    """Classes instead of text; positions are added to the patches."""
    size = 2 * IMAGE_ROWS
    model = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, num_layers=2, sample_size=size, num_embeds_ada_norm=10
    )
    return model, {
        "hidden_states": draw(1, 4, size, size),
        "timestep": fill(500),
        "class_labels": torch.zeros(1, dtype=torch.long),
    }


def prx() -> Built:
    """Queries of the latents alone; keys of text and latents."""
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=64, num_heads=2, depth=2, axes_dim=[16, 16]
    )
    return model, {**_ask_image(0.5), "attention_mask": mask_text(TEXT)}


def ernie() -> Built:
    """Latents then text in one sequence, sequence before batch."""
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(8, 12, 12),
    )
    return model, {
        "hidden_states": draw(1, 4, IMAGE_ROWS, IMAGE_COLUMNS),
        "timestep": fill(500),
        "text_bth": draw(1, TEXT, 16),
        "text_lens": torch.tensor([TEXT]),
    }


def joyimage() -> Built:
    """Two pictures, the second to be edited, as frames of a video."""
    model = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=64,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[8, 12, 12],
    )
    return model, {
        **_ask_image(500),
        "hidden_states": draw(1, 4, 2, 2 * IMAGE_ROWS, 2 * IMAGE_COLUMNS),
    }


def krea2() -> Built:
    """Text of several layers is fused and refined by itself; grouped keys; positions as input."""
    model = diffusers.Krea2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 12, 12),
    )
    positions = [torch.zeros(TEXT, 3), number_positions(IMAGE_ROWS, IMAGE_COLUMNS)]
    return model, {
        **_ask_packed(),
        "encoder_hidden_states": draw(1, TEXT, 2, 32),
        "position_ids": torch.cat(positions),
    }


def nucleus() -> Built:
    """Queries of the latents alone; keys of latents and text, grouped."""
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 12, 12),
        moe_enabled=False,
    )
    return model, {
        **_ask_packed(),
        "img_shapes": [(1, IMAGE_ROWS, IMAGE_COLUMNS)],
        "encoder_hidden_states_mask": mask_text(TEXT),
    }


IMAGES: tuple[Builder, ...] = (
    flux,
    flux_kontext,
    flux2,
    flux2_edit,
    flux3,
    chroma,
    chroma_boolean,
    bria,
    bria_fibo,
    bria_fibo2,
    ovis,
    longcat,
    qwen,
    qwen_nomask,
    qwen_edit,
    qwen_edit_plus,
    qwen_layered,
    qwen21,
    hunyuan_image,
    hunyuan_dit,
    sd3,
    auraflow,
    pixart,
    sana,
    lumina2,
    lumina2_ragged,
    lumina_next,
    hidream,
    hidream_rect,
    omnigen,
    zimage,
    zimage_ragged,
    cogview3,
    cogview4,
    glm,
    dit,
    prx,
    ernie,
    joyimage,
    krea2,
    nucleus,
)


def _ask_image(timestep: float = 500, text: int = TEXT) -> dict[str, Any]:
    return {
        "hidden_states": draw_image(),
        "timestep": fill(timestep),
        "encoder_hidden_states": draw(1, text, 16),
    }


def _ask_packed(timestep: float = 0.5, tokens: int = IMAGE_TOKENS) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, tokens, 8),
        "timestep": fill(timestep),
        "encoder_hidden_states": draw(1, TEXT, 16),
    }


def _number_packed() -> dict[str, torch.Tensor]:
    return {
        "img_ids": number_positions(IMAGE_ROWS, IMAGE_COLUMNS),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _make_flux() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(**FLUX, pooled_projection_dim=8, guidance_embeds=True)


def _ask_flux() -> dict[str, Any]:
    pooled = {"pooled_projections": draw(1, 8), "guidance": fill(3.5)}
    return {**_ask_packed(), **_number_packed(), **pooled}


def _make_flux2() -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(**FLUX2, timestep_guidance_channels=16)


def _ask_flux2() -> dict[str, Any]:
    text = torch.zeros(1, TEXT, 4, dtype=torch.long)
    text[..., 3] = torch.arange(TEXT)
    return {
        **_ask_packed(),
        "img_ids": _number_by_four_axes()[None],
        "txt_ids": text,
        "guidance": fill(4.0),
    }


def _number_by_four_axes(picture: int = 0) -> torch.Tensor:
    return number_positions(IMAGE_ROWS, IMAGE_COLUMNS, axes=4, picture=picture).long()


def _ask_qwen(shapes: list[tuple[int, int, int]] | None = None) -> dict[str, Any]:
    shapes = shapes or [(1, IMAGE_ROWS, IMAGE_COLUMNS)]
    return {
        **_ask_packed(tokens=sum(t * h * w for t, h, w in shapes)),
        "encoder_hidden_states_mask": mask_text(TEXT),
        "img_shapes": [shapes],
    }


def _make_lumina2() -> torch.nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=4,
        hidden_size=96,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(128, 64, 64),
        cap_feat_dim=16,
    )


def _ask_lumina2(padded: int) -> dict[str, Any]:
    return {**_ask_image(0.5), "encoder_attention_mask": mask_text(TEXT, padded).bool()}


def _make_hidream() -> torch.nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[16, 12],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(16, 8, 8),
        max_resolution=(80, 80),
        llama_layers=[0, 1],
        force_inference_output=True,
    )


def _ask_hidream(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, height, width),
        "timesteps": fill(500),
        "encoder_hidden_states_t5": draw(1, 20, 16),
        "encoder_hidden_states_llama3": draw(2, 1, 20, 12),
        "pooled_embeds": draw(1, 8),
    }


def _make_zimage() -> torch.nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )


def _ask_zimage(*captions: int) -> dict[str, Any]:
    return {
        "x": [draw(4, 1, 2 * IMAGE_ROWS, 2 * IMAGE_COLUMNS) for _ in captions],
        "t": torch.full((len(captions),), 0.5),
        "cap_feats": [draw(tokens, 16) for tokens in captions],
    }


def _describe_size() -> dict[str, torch.Tensor]:
    return {"target_size": torch.full((1, 2), 64.0), "crop_coords": torch.zeros(1, 2)}
