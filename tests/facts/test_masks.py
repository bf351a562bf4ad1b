from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_opt.facts.masks import MaskKind, classify_mask
from dit_opt.facts.sites import find_sites
from tests.graphs import capture_one, capture_tiny
from zoo import small

Q = torch.randn(2, 2, 6, 4)
VALID = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


def classify(make_mask, *args, **kwargs):
    def attend(q, *arguments):
        return F.scaled_dot_product_attention(q, q, q, make_mask(*arguments))

    (site,) = find_sites(capture_one(attend, Q, *args, **kwargs).graph)
    return classify_mask(site)


def repeat_outer(valid):
    mask_1 = valid.bool().view(2, 1, 1, 6).repeat(1, 1, 6, 1)
    mask_2 = mask_1.transpose(2, 3)
    return (mask_1 & mask_2).bool()


def transpose_by_keywords(valid):
    mask = valid.bool().view(2, 1, 1, 6).repeat(1, 1, 6, 1)
    return mask & mask.transpose(dim0=2, dim1=3)


def swap_by_keywords(valid):
    mask = valid.bool().view(2, 1, 1, 6).repeat(1, 1, 6, 1)
    return mask & mask.swapaxes(axis0=2, axis1=3)


def index_outer(valid):
    valid = valid.bool()
    return valid[:, None, None, :] & valid[:, None, :, None]


def times_outer(valid):
    valid = valid.bool()
    return valid[:, None, None, :] * valid[:, None, :, None]


def expand_outer(valid):
    valid = valid.bool()
    keys = valid.unsqueeze(1).unsqueeze(1).expand(-1, -1, 6, -1)
    return torch.logical_and(keys, valid.unsqueeze(1).unsqueeze(-1))


def test_no_mask():
    (site,) = find_sites(capture_one(lambda q: F.scaled_dot_product_attention(q, q, q), Q).graph)
    assert classify_mask(site) == (MaskKind.NONE, None)


@pytest.mark.parametrize("shape", [(2, 1, 1, 6), (1, 1, 1, 6), (1, 6), (1, 1, 6)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_key_padding_by_shape(shape, dtype):
    kind, keys = classify(lambda mask: mask, torch.ones(shape, dtype=dtype))
    assert kind is MaskKind.KEY_PADDING and keys.meta["example_value"].shape == shape


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.bool()[:, None, None, :].expand(2, 2, 6, 6),
        lambda m: m.bool().view(2, 1, 1, 6).repeat(1, 1, 6, 1),
        lambda m: m.bool()[0].expand(6, 6),
    ],
)
def test_key_padding_by_construction(make):
    kind, keys = classify(make, VALID)
    assert kind is MaskKind.KEY_PADDING
    assert keys.meta["example_value"].shape[-1] == 6 and keys.meta["example_value"].numel() <= 12


@pytest.mark.parametrize(
    "make",
    [
        repeat_outer,
        transpose_by_keywords,
        swap_by_keywords,
        index_outer,
        times_outer,
        expand_outer,
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_outer_product(make, dynamic):
    kind, keys = classify(make, VALID, dynamic=dynamic)
    assert kind is MaskKind.OUTER
    example = keys.meta["example_value"]
    assert example.dtype == torch.bool and example.dim() == 2


def written_after(valid):
    mask = repeat_outer(valid)
    mask[:, :, :, 0] = True
    return mask


def written_before_the_product(valid):
    keys = valid.bool().view(2, 1, 1, 6).repeat(1, 1, 6, 1)
    queries = keys.transpose(2, 3).clone()
    queries[..., 0] = True
    return keys & queries


def two_vectors(valid, other):
    return valid.bool()[:, None, None, :] & other.bool()[:, None, :, None]


def either(valid):
    return valid.bool()[:, None, None, :] | valid.bool()[:, None, :, None]


def heads_differ(valid):
    return torch.stack([valid, 1 - valid], 1).bool()[:, :, None]


def negated_rows(valid):
    valid = valid.bool()
    return valid[:, None, None, :] & ~valid[:, None, :, None]


def batch_moved(valid):
    # [B, N] in front of new dimensions would be read as [H, N]
    return valid.bool()[:, None, :].expand(2, 2, 6, 6)


def by_out(valid):
    mask = valid.bool()
    copied = mask[:, None, None, :].expand(2, 1, 6, 6).clone()
    torch.logical_or(mask, ~mask, out=mask)
    return copied


def by_a_flag(valid):
    bias = valid - 0.5
    copied = bias[:, None, None, :].repeat(1, 1, 6, 1)
    F.relu(bias, inplace=True)
    return copied


def by_an_operator(valid):
    bias = valid * 1.0
    copied = bias[:, None, None, :].repeat(1, 1, 6, 1)
    torch.ops.aten.fill_.Scalar(bias, 0.0)
    return copied


def through_flatten(valid):
    bias = valid * 1.0
    copied = bias[:, None, None, :].repeat(1, 1, 6, 1)
    bias.flatten().zero_()
    return copied


def through_an_einsum(valid):
    bias = valid * 1.0
    copied = bias[:, None, None, :].repeat(1, 1, 6, 1)
    torch.einsum("bn->nb", bias).zero_()
    return copied


@pytest.mark.parametrize(
    "make", [by_out, by_a_flag, by_an_operator, through_flatten, through_an_einsum]
)
def test_a_vector_written_after_it_was_copied(make):
    assert classify(make, VALID) == (MaskKind.OTHER, None)


def test_a_vector_made_by_writes():
    def make(valid):
        mask = torch.zeros(2, 6, dtype=torch.bool)
        mask[:, :4] = valid[:, :4].bool()
        return mask[:, None, None, :].expand(2, 2, 6, 6)

    kind, keys = classify(make, VALID)
    assert kind is MaskKind.KEY_PADDING and keys.meta["example_value"].shape == (2, 6)


@pytest.mark.parametrize("shape", [(6, 6), (2, 1, 6)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_short_mask_of_queries_or_heads(shape, dtype):
    # heads and batch are both 2: the first dimension is that of heads
    assert classify(lambda mask: mask, torch.ones(shape, dtype=dtype)).kind is MaskKind.OTHER


def sliding_window(valid):
    index = torch.arange(6)
    return (index[:, None] - index[None]).abs() < 3


def head_by_view(valid):
    return valid.bool().unsqueeze(1)


def head_by_repeat(valid):
    return valid.bool()[:, None].repeat(1, 6, 1)


def head_outer(valid):
    valid = valid.bool()
    return valid[:, None, :] & valid[:, :, None]


@pytest.mark.parametrize("make", [sliding_window, head_by_view, head_by_repeat, head_outer])
def test_a_short_mask_that_the_graph_makes(make):
    assert classify(make, VALID) == (MaskKind.OTHER, None)


def test_a_short_mask_is_honoured_where_the_query_is_short_too():
    def attend(q, mask):
        return F.scaled_dot_product_attention(q, q, q, mask)

    (site,) = find_sites(capture_one(attend, Q[:, 0], torch.ones(2, 1, 6)).graph)
    assert classify_mask(site).kind is MaskKind.KEY_PADDING


@pytest.mark.parametrize("shape", [(2, 1, 1, 6), (1, 1, 1, 1, 6)])
def test_a_mask_that_makes_the_result_larger(shape):
    def attend(q, mask):
        return (q @ q.mT + mask).softmax(-1) @ q

    (site,) = find_sites(capture_one(attend, Q[:1], torch.ones(shape)).graph)
    assert classify_mask(site) == (MaskKind.OTHER, None)


@pytest.mark.parametrize(
    "make",
    [written_after, written_before_the_product, either, heads_differ, negated_rows, batch_moved],
)
def test_others(make):
    assert classify(make, VALID) == (MaskKind.OTHER, None)


def test_two_vectors_are_no_outer_product():
    assert classify(two_vectors, VALID, VALID.flip(0)).kind is MaskKind.OTHER


def test_a_product_of_numbers_is_added_to_the_scores_and_no_outer_mask():
    def numbers(valid):
        valid = valid.float()
        return valid[:, None, None, :] * valid[:, None, :, None]

    assert classify(numbers, VALID).kind is MaskKind.OTHER


def test_dense_mask_is_other():
    assert classify(lambda mask: mask, torch.ones(2, 1, 6, 6).bool()).kind is MaskKind.OTHER


def test_hunyuan_video_masks():
    _, gm = capture_tiny(small.hunyuan_video)
    sites = find_sites(gm.graph)
    kinds = [classify_mask(s).kind for s in sites]
    # the text refiner writes into its outer product
    assert kinds == [MaskKind.OTHER, MaskKind.KEY_PADDING, MaskKind.KEY_PADDING]
