from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_opt.facts.grids import TokenGrid, find_spans
from dit_opt.facts.labels import Labels
from dit_opt.facts.layouts import SegmentKind
from dit_opt.facts.rules import label_axes
from dit_opt.facts.sites import find_sites
from dit_opt.facts.tokens import find_tokens
from tests.graphs import capture_one

TEXT = torch.randn(2, 7, 8)


def spans_of(function, *args, **kwargs):
    gm = capture_one(function, *args, **kwargs)
    return find_spans(gm.graph, label_axes(gm.graph))


def patchify(video):
    return video.flatten(2).transpose(1, 2)


def attend(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def read_block(spans, *shapes, function=attend):
    """The layout of the first site of a graph whose first input has these spans."""
    gm = capture_one(function, *(torch.randn(shape) for shape in shapes))
    (first, *_) = gm.graph.find_nodes(op="placeholder")
    sites = find_sites(gm.graph)
    tokens = find_tokens(gm.graph, sites, {first: spans})
    return tokens.layouts[sites[0].node]


def test_outputs_tell_where_their_tokens_lie():
    def model(video, text):
        tokens = patchify(video)
        return torch.cat([text, tokens], 1), text + 1, tokens.transpose(1, 2), video

    found = spans_of(model, torch.randn(2, 8, 3, 4, 5), TEXT)
    assert found == {
        0: ((1, ((7, None), (60, (3, 4, 5)))),),
        2: ((2, ((60, (3, 4, 5)),)),),
    }


def test_nothing_is_told_of_sizes_that_differ_from_call_to_call_nor_of_assumed_grids():
    assert spans_of(patchify, torch.randn(2, 8, 3, 4, 5), dynamic=True) == {}

    def assumed(x):
        table = (torch.arange(3.0)[:, None] + torch.arange(20.0)).flatten()
        return x + table[None, :, None]

    assert spans_of(assumed, torch.randn(2, 60, 8)) == {}


def test_a_block_knows_the_grid_of_what_it_is_given():
    layout = read_block(((1, ((60, (3, 4, 5)),)),), (2, 60, 8))
    assert layout.grid == TokenGrid((3, 4, 5), "latents")
    assert [s.kind for s in layout.query] == [SegmentKind.LATENTS]


def test_a_packed_sequence_knows_its_text():
    layout = read_block(((1, ((7, None), (60, (3, 4, 5)))),), (2, 67, 8))
    assert layout.grid == TokenGrid((3, 4, 5), "latents")
    assert [(int(s.start), int(s.stop)) for s in layout.query] == [(0, 7), (7, 67)]
    assert layout.latents == layout.query[1]


def test_one_frame_of_what_is_given_keeps_its_rows_and_columns():
    layout = read_block(
        ((1, ((60, (3, 4, 5)),)),), (2, 60, 8), function=lambda x: attend(x[:, :20])
    )
    assert layout.grid == TokenGrid((1, 4, 5), "latents")


def test_spans_of_another_length_are_left_out():
    gm = capture_one(attend, torch.randn(2, 61, 8))
    (first, *_) = gm.graph.find_nodes(op="placeholder")
    labels: Labels = label_axes(gm.graph, {first: ((1, ((60, (3, 4, 5)),)),)})
    assert len(labels[first][1]) == 1


def test_what_a_block_returns_tells_the_next_one():
    gm = capture_one(attend, torch.randn(2, 67, 8))
    (first, *_) = gm.graph.find_nodes(op="placeholder")
    spans = ((1, ((7, None), (60, (3, 4, 5)))),)
    assert find_spans(gm.graph, label_axes(gm.graph, {first: spans})) == {0: spans}
