from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor

from dit_opt.facts.layouts import SegmentKind, SiteKind, TokenGrid, declare_grid
from dit_opt.facts.nodes import input_name
from dit_opt.facts.sites import Form, find_sites
from dit_opt.facts.tokens import find_tokens
from tests.graphs import capture
from zoo import small

LATENTS, TEXT, OTHER = SegmentKind.LATENTS, SegmentKind.TEXT, SegmentKind.OTHER


def layouts_of(gm):
    sites = find_sites(gm.graph)
    tokens = find_tokens(gm.graph, sites)
    return [tokens.layouts[site.node] for site in sites]


def layouts(function, *args, **kwargs):
    (gm,) = capture(function, *args, **kwargs)
    return layouts_of(gm)


def attend(q, k=None):
    """[B, N, C] -> [B, N, C] by one head."""
    k = q if k is None else k
    return F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])[:, 0]


def describe(segments):
    return [(s.kind, int(s.start), int(s.stop), s.source) for s in segments]


VIDEO = (LATENTS, 0, 60, "hidden_states")
PROMPT = (TEXT, 0, 7, "encoder_hidden_states")
# model: [(kind of site, segments of the queries, segments of the keys), ...], each once
EXPECTED = {
    "wan": [(SiteKind.SELF, [VIDEO], [VIDEO]), (SiteKind.CROSS, [VIDEO], [PROMPT])],
    "ltx": [(SiteKind.SELF, [VIDEO], [VIDEO]), (SiteKind.CROSS, [VIDEO], [PROMPT])],
    "hunyuan_video": [
        (SiteKind.SELF, [PROMPT], [PROMPT]),
        (SiteKind.JOINT, [VIDEO, (TEXT, 60, 67, "encoder_hidden_states")], None),
    ],
    "cogvideox_rope": [(SiteKind.JOINT, [PROMPT, (LATENTS, 7, 67, "hidden_states")], None)],
    "flux": [(SiteKind.JOINT, [PROMPT, (LATENTS, 7, 27, "hidden_states")], None)],
    "sd3": [
        (
            SiteKind.JOINT,
            [(LATENTS, 0, 20, "hidden_states"), (TEXT, 20, 27, "encoder_hidden_states")],
            None,
        ),
        (SiteKind.SELF, [(LATENTS, 0, 20, "hidden_states")], None),
    ],
    "dit": [(SiteKind.SELF, [(LATENTS, 0, 36, "hidden_states")], None)],
}


@pytest.mark.parametrize("build", small.ALL, ids=lambda f: f.__name__)
def test_every_site_of_every_model(build):
    tiny = build()
    found = layouts(tiny.model, **tiny.inputs)
    assert len(found) == tiny.n_sites
    distinct = []
    for layout in found:
        row = (layout.kind, describe(layout.query), describe(layout.key))
        if row not in distinct:
            distinct.append(row)
        on_latents = any(s.kind is LATENTS for s in layout.query)
        if on_latents and tiny.grid is not None:
            assert layout.grid is not None and layout.grid.sizes == tiny.grid
            assert all(isinstance(n, sympy.Integer) for n in layout.grid.sizes)
            assert layout.grid.source == ("tables" if tiny.name == "ltx" else "latents")
            assert layout.reason == ""
        else:
            assert layout.grid is None and layout.reason
    wanted = [(kind, query, key or query) for kind, query, key in EXPECTED[tiny.name]]
    assert distinct == wanted


def test_flux_says_why_it_has_no_grid():
    tiny = small.flux()
    for layout in layouts(tiny.model, **tiny.inputs):
        assert "'hidden_states'" in layout.reason and "'img_ids' from outside" in layout.reason
        assert 'options={"grid": (T, H, W)}' in layout.reason


DYNAMIC = (
    small.wan,
    small.cogvideox,
    small.ltx_video,
    small.sd3,
    small.hunyuan_video,
    small.dit,
)


@pytest.mark.parametrize("build", DYNAMIC, ids=lambda f: f.__name__)
def test_symbolic_sizes(build):
    tiny = build(batch=2)
    (gm,) = capture(tiny.model, dynamic=True, **tiny.inputs)
    symbols = _values_of_symbols(gm, tiny.inputs)
    environment = symbols.pop("environment")
    before = len(environment.guards), len(environment.deferred_runtime_asserts)
    found = layouts_of(gm)
    assert (len(environment.guards), len(environment.deferred_runtime_asserts)) == before
    gridded = [layout for layout in found if layout.grid is not None]
    assert gridded
    for layout in gridded:
        assert any(not n.is_Integer for n in layout.grid.sizes)
        assert tuple(int(n.subs(symbols)) for n in layout.grid.sizes) == tiny.grid
        latents = next(s for s in layout.query if s.kind is LATENTS)
        count = int(sympy.sympify(latents.stop - latents.start).subs(symbols))
        assert count == tiny.grid[0] * tiny.grid[1] * tiny.grid[2]


def _values_of_symbols(gm, inputs):
    """What each size symbol of the graph stands for, and the shape environment."""
    from torch.utils._pytree import tree_flatten_with_path

    named = {
        "_".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path): value
        for path, value in tree_flatten_with_path(inputs)[0]
    }
    values = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        example = node.meta["example_value"]
        name = input_name(node)
        if isinstance(example, torch.SymInt) and name in named:
            values.setdefault(example.node.expr, named[name])
            values["environment"] = example.node.shape_env
        elif isinstance(example, torch.Tensor) and name in named:
            for size, real in zip(example.shape, named[name].shape, strict=True):
                if isinstance(size, torch.SymInt):
                    values.setdefault(size.node.expr, real)
                    values["environment"] = size.node.shape_env
    return values


@pytest.mark.parametrize("build", [small.wan, small.ltx_video, small.cogvideox])
def test_one_frame_is_a_grid_of_one_frame(build):
    tiny = build(grid=(1, 4, 5), layers=1)
    assert layouts(tiny.model, **tiny.inputs)[0].grid.sizes == (1, 4, 5)


def test_a_grid_of_width_one_is_never_guessed():
    """(3, 4, 1) looks like one frame of 3 x 4 once its last axis is gone."""
    for build in (small.wan, small.ltx_video, small.cogvideox):
        tiny = build(grid=(3, 4, 1), layers=1)
        layout = layouts(tiny.model, **tiny.inputs)[0]
        assert layout.grid is None and layout.reason


def test_decomposed_attention_has_the_same_layout():
    tiny = small.dit(batch=2)
    for module in tiny.model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    (gm,) = capture(tiny.model, **tiny.inputs)
    assert [s.form for s in find_sites(gm.graph)] == [Form.DECOMPOSED] * tiny.n_sites
    for layout in layouts_of(gm):
        assert layout.kind is SiteKind.SELF and layout.grid == TokenGrid((1, 6, 6), "latents")


def capture_block(tiny, path):
    """The graph of one block, as regional compilation makes it."""
    calls = []
    block = tiny.model.get_submodule(path)
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny()
    handle.remove()
    args, kwargs = calls[0]
    (gm,) = capture(block, *args, **kwargs)
    return layouts_of(gm)


def test_a_block_alone_has_no_grid_until_the_user_says_so():
    own, cross = capture_block(small.wan(), "blocks.0")
    assert own.kind is SiteKind.SELF and describe(own.query)[0][:3] == VIDEO[:3]
    assert cross.kind is SiteKind.CROSS and describe(cross.key)[0][:3] == PROMPT[:3]
    assert own.grid is None and "packed" in own.reason and 'options={"grid"' in own.reason
    declared = declare_grid(own, (3, 4, 5))
    assert declared.grid == TokenGrid((3, 4, 5), "option") and declared.reason == ""


def test_a_joint_block_alone_does_not_tell_text_from_latents():
    (layout,) = capture_block(small.cogvideox(), "transformer_blocks.0")
    assert layout.kind is SiteKind.JOINT and layout.grid is None
    assert [s.kind for s in layout.query] == [OTHER, OTHER]
    assert "Several segments reach the output" in layout.reason
    declared = declare_grid(layout, (3, 4, 5))
    assert [s.kind for s in declared.query] == [OTHER, LATENTS]
    assert declared.key == declared.query and declared.grid.sizes == (3, 4, 5)


def test_pictures_of_one_size_are_frames_of_one_grid():
    tiny = small.qwen_image(batch=2)
    (layout,) = layouts(tiny.model, **tiny.inputs)
    assert layout.kind is SiteKind.JOINT and layout.key == layout.query
    assert describe(layout.query) == [PROMPT, (LATENTS, 7, 47, "hidden_states")]
    assert layout.grid == TokenGrid((2, 4, 5), "tables")


def test_pictures_of_several_sizes_are_latents_without_a_grid():
    tiny = small.qwen_image(pictures=((1, 4, 5), (1, 3, 7)))
    (layout,) = layouts(tiny.model, **tiny.inputs)
    assert describe(layout.query) == [PROMPT, (LATENTS, 7, 48, "hidden_states")]
    assert layout.grid is None and "(1, 4, 5), (1, 3, 7)" in layout.reason


@pytest.mark.parametrize("frames", [1, 3])
def test_a_first_frame_apart_is_a_frame_of_the_clip(frames):
    tiny = small.hunyuan_video(grid=(frames, 4, 5), image_condition="token_replace")
    found = [x for x in layouts(tiny.model, **tiny.inputs) if x.kind is SiteKind.JOINT]
    assert len(found) == 2
    for layout in found:
        assert [s.kind for s in layout.query] == [LATENTS, TEXT]
        assert layout.grid == TokenGrid((frames, 4, 5), "latents")


@pytest.mark.parametrize(("batch", "texts"), [(1, (7,)), (2, (7, 40))])
def test_samples_in_lists_are_padded_behind_their_tokens(batch, texts):
    tiny = small.z_image(batch=batch, texts=texts)
    # makes its rotary tables, which Dynamo does not follow
    tiny()
    image, text, joint = layouts(tiny.model, **tiny.inputs)
    for layout in (image, joint):
        latents, padding, *_ = layout.query
        assert (latents.kind, int(latents.start), int(latents.stop)) == (LATENTS, 0, 20)
        assert (padding.kind, int(padding.stop)) == (OTHER, 32)
        assert layout.grid == TokenGrid((1, 4, 5), "latents") and layout.key == layout.query
    assert text.latents is None
    kept = [s.kind for s in joint.query[2:]]
    assert LATENTS not in kept and (TEXT in kept) == (batch == 1)


def test_only_segments_with_a_grid_are_latents_where_text_reaches_the_output_too():
    def block(video, text):
        tokens = video.flatten(2).transpose(1, 2)
        joint = attend(torch.cat([tokens, text], 1))
        return joint[:, :60], joint[:, 60:]

    (layout,) = layouts(block, torch.randn(2, 8, 3, 4, 5), torch.randn(2, 7, 8))
    assert describe(layout.query) == [(LATENTS, 0, 60, "video"), (OTHER, 60, 67, "text")]
    assert layout.grid == TokenGrid((3, 4, 5), "latents")


def test_the_same_tokens_twice_are_not_two_clips():
    def model(video):
        tokens = video.flatten(2).transpose(1, 2)
        return attend(torch.cat([tokens, tokens], 1))

    (layout,) = layouts(model, torch.randn(2, 8, 3, 4, 5))
    assert layout.latents is None and layout.grid is None


def test_text_between_two_pictures_is_not_counted_among_them():
    def model(x, text, y):
        x, y = (picture.flatten(2).transpose(1, 2) for picture in (x, y))
        return attend(torch.cat([x, text, y], 1))

    args = torch.randn(2, 8, 4, 5), torch.randn(2, 7, 8), torch.randn(2, 8, 4, 5)
    (layout,) = layouts(model, *args)
    assert layout.latents is None and "Several segments" in layout.reason


def test_keys_without_the_pictures_of_the_queries_hold_no_latents():
    def model(x, y):
        x, y = (picture.flatten(2).transpose(1, 2) for picture in (x, y))
        both = torch.cat([x, y], 1)
        return attend(both) + attend(both, x)

    joint, half = layouts(model, torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4, 5))
    assert describe(joint.key) == [(LATENTS, 0, 40, None)]
    assert half.kind is SiteKind.UNKNOWN and half.key[0].kind is OTHER


def test_a_block_alone_without_text_may_hold_text_among_its_tokens():
    (layout,) = capture_block(small.dit(), "transformer_blocks.0")
    assert layout.kind is SiteKind.SELF and [s.kind for s in layout.query] == [OTHER]
    assert "whether text is among them" in layout.reason


def test_a_declared_grid_that_fits_no_segment_is_refused():
    (layout, *_) = capture_block(small.wan(), "blocks.0")
    refused = declare_grid(layout, (3, 4, 6))
    assert refused.grid is None and refused.query == layout.query
    assert "(3, 4, 6) of 72 tokens" in refused.reason and "60 tokens" in refused.reason


def test_text_takes_a_grid_only_where_nothing_else_has_its_length():
    def model(x, text):
        return attend(x, torch.cat([text, x], 1)) + attend(text).mean(1, keepdim=True)

    _, words = layouts(model, torch.randn(2, 72, 8), torch.randn(2, 60, 8))
    assert words.latents is None and [s.kind for s in words.query] == [TEXT]
    refused = declare_grid(words, (3, 4, 5))
    assert refused.grid is None and refused.latents is None and "60 tokens" in refused.reason
    declared = declare_grid(words, (3, 4, 5), among_text=True)
    assert declared.latents.source == "text" and declared.grid.sizes == (3, 4, 5)
    # a lone block: its segments are no text of which anything is known
    (joint,) = capture_block(small.cogvideox(), "transformer_blocks.0")
    assert declare_grid(joint, (3, 4, 5), among_text=True) == declare_grid(joint, (3, 4, 5))


def test_a_proved_grid_is_not_overruled():
    tiny = small.wan(layers=1)
    layout = layouts(tiny.model, **tiny.inputs)[0]
    assert declare_grid(layout, (5, 4, 3)) is layout


def grid_table(*sizes):
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in sizes), indexing="ij"))


def test_position_tables_of_packed_tokens_prove_the_grid():
    def model(x):
        return attend(x + grid_table(3, 4, 5).flatten(1).sum(0)[None, :, None])

    (layout,) = layouts(model, torch.randn(2, 60, 8))
    assert layout.grid == TokenGrid((3, 4, 5), "tables")


def test_tables_of_two_factors_prove_the_cut_and_no_frames():
    def model(x):
        frames, places = grid_table(3, 20)
        return attend(x + (frames + places).flatten()[None, :, None])

    (layout,) = layouts(model, torch.randn(2, 60, 8))
    assert layout.grid == TokenGrid((1, 3, 20), "tables", assumed=True)
    assert layout.grid != TokenGrid((1, 3, 20), "tables")


def test_tables_that_contradict_each_other_prove_nothing():
    def model(x):
        first, second = (grid_table(*s).flatten(1).sum(0) for s in ((3, 4, 5), (3, 5, 4)))
        return attend(x + first[None, :, None] + second[None, :, None])

    (layout,) = layouts(model, torch.randn(2, 60, 8))
    assert layout.grid is None and 'options={"grid"' in layout.reason


def test_windows_of_tokens_are_no_grid():
    """Only tables made of positions count: tokens are split for other reasons too."""

    def model(x):
        pooled = x.view(2, 6, 10, 8).mean(2, keepdim=True)
        return attend((x.view(2, 6, 10, 8) + pooled).view(2, 60, 8))

    (layout,) = layouts(model, torch.randn(2, 60, 8))
    assert layout.grid is None


def test_an_op_without_a_rule_ends_the_axis():
    def model(x):
        tokens = x.flatten(2).transpose(1, 2)
        return attend(tokens.roll(1, 1)).transpose(1, 2).unflatten(2, (3, 4, 5))

    (layout,) = layouts(model, torch.randn(2, 8, 3, 4, 5))
    assert layout.grid is None and "roll" in layout.reason


def test_transposed_tokens_are_not_row_major():
    def model(x):
        tokens = x.permute(0, 4, 3, 2, 1).flatten(1, 3)
        return attend(tokens).unflatten(1, (5, 4, 3)).permute(0, 4, 3, 2, 1)

    (layout,) = layouts(model, torch.randn(2, 8, 3, 4, 5))
    assert layout.grid is None and "row-major" in layout.reason


def test_latents_among_more_keys_are_joint_and_other_keys_are_cross():
    def model(x, text):
        x = attend(x, torch.cat([text, x], 1))
        return attend(x, text)

    joint, cross = layouts(model, torch.randn(2, 60, 8), torch.randn(2, 7, 8))
    assert joint.kind is SiteKind.JOINT
    assert describe(joint.key) == [(TEXT, 0, 7, "text"), (LATENTS, 7, 67, "x")]
    assert cross.kind is SiteKind.CROSS


def test_registers_are_a_segment_of_their_own():
    registers = torch.nn.Parameter(torch.randn(1, 4, 8))

    def model(x, text):
        x = torch.cat([registers.expand(2, -1, -1), text, x], 1)
        return attend(x)[:, 11:]

    (layout,) = layouts(model, torch.randn(2, 60, 8), torch.randn(2, 7, 8))
    assert layout.kind is SiteKind.JOINT
    assert describe(layout.query) == [
        (OTHER, 0, 4, None),
        (TEXT, 4, 11, "text"),
        (LATENTS, 11, 71, "x"),
    ]


def test_a_buffer_filled_by_slices_is_a_joint_sequence():
    def model(x, text):
        buffer = x.new_zeros(2, 67, 8)
        buffer[:, :7] = text
        buffer[:, 7:] = x
        return attend(buffer)[:, 7:]

    (layout,) = layouts(model, torch.randn(2, 60, 8), torch.randn(2, 7, 8))
    assert describe(layout.query) == [(TEXT, 0, 7, "text"), (LATENTS, 7, 67, "x")]


def test_multi_head_attention_hides_its_tokens():
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    found = layouts(lambda x: attention(x, x, x, need_weights=False)[0].sin(), torch.randn(2, 6, 8))
    assert all(layout.kind is SiteKind.UNKNOWN and layout.reason for layout in found)
