"""Writes in place that keep written-out attention from becoming one call."""

from __future__ import annotations

import pytest
import torch

from dit_opt.decisions import AttentionReason
from dit_opt.facts.sites import find_sites
from tests.graphs import capture_one

Q, K, V = torch.randn(3, 2, 3, 8, 4)
MASK = torch.zeros(2, 1, 8, 8)


def find_one(function, q=Q, k=K, v=V, mask=MASK):
    def attend(q, k, v, mask):
        # nothing here is an input of the graph, so that Dynamo lets everything be written
        return function(q * 1.0, k * 1.0, v * 1.0, mask * 1.0)

    (site,) = find_sites(capture_one(attend, q, k, v, mask).graph)
    return site


def query_written(q, k, v, mask):
    scores = q @ k.mT
    q.mul_(0.0)
    return scores.softmax(-1) @ v


def query_written_by_an_operator(q, k, v, mask):
    weights = (q @ k.mT).softmax(-1)
    torch.ops.aten.copy_.default(q, v)
    return weights @ v


def query_written_under_the_name_of_a_write(q, k, v, mask):
    other = q.mul_(0.5)
    scores = q @ k.mT
    other.zero_()
    return scores.softmax(-1) @ v


def key_written_through_its_transpose(q, k, v, mask):
    turned = k.transpose(-1, -2)
    scores = q @ turned
    turned.zero_()
    return scores.softmax(-1) @ v


def key_written_through_its_base(q, k, v, mask):
    base = torch.cat([k, v], -1)
    k, v = base.chunk(2, -1)
    scores = q @ k.mT
    base[..., :4].add_(1.0)
    return scores.softmax(-1) @ v


def cast_written(q, k, v, mask):
    wide = q.float()
    wide.mul_(0.5)
    return (wide @ k.float().mT).softmax(-1).to(v.dtype) @ v


def mask_written(q, k, v, mask):
    scores = q @ k.mT * 0.5 + mask
    mask.fill_(0.0)
    return scores.softmax(-1) @ v


def mask_is_the_buffer_of_the_scores(q, k, v, mask):
    scores = mask
    scores += q[:, :1] @ k[:, :1].mT
    return scores.softmax(-1) @ v[:, :1], mask


def scores_in_a_buffer(q, k, v, mask):
    buffer = torch.empty(2, 3, 8, 8)
    weights = torch.softmax(q @ k.mT, -1, out=buffer)
    return weights @ v, buffer


def one_buffer_for_query_and_value(q, k, v, mask):
    buffer = torch.empty(6, 8, 4)
    buffer.copy_(q.flatten(0, 1))
    scores = torch.bmm(buffer, k.flatten(0, 1).mT)
    torch.mul(v.flatten(0, 1), 1.0, out=buffer)
    return torch.bmm(scores.softmax(-1), buffer)


REFUSED = (
    query_written,
    query_written_by_an_operator,
    query_written_under_the_name_of_a_write,
    key_written_through_its_transpose,
    key_written_through_its_base,
    mask_written,
    mask_is_the_buffer_of_the_scores,
    scores_in_a_buffer,
    one_buffer_for_query_and_value,
)


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_a_write_before_the_last_product_refuses(function):
    site = find_one(function)
    assert site.refusal is AttentionReason.SHARED_INTERMEDIATE
    assert site.detail


def test_a_write_to_a_cast_that_is_undone_refuses():
    site = find_one(cast_written, *(x.bfloat16() for x in (Q, K, V)))
    assert site.refusal is AttentionReason.SHARED_INTERMEDIATE and "mul_" in site.detail


def scaled_before(q, k, v, mask):
    turned = k.mT
    q.mul_(0.5)
    k.mul_(0.5)
    return (q @ turned).softmax(-1) @ v


def mask_made_after_the_product(q, k, v, mask):
    scores = q @ k.mT
    mask.masked_fill_(mask > 0, float("-inf"))
    return (scores + mask).softmax(-1) @ v


def value_written(q, k, v, mask):
    weights = (q @ k.mT).softmax(-1)
    v.mul_(2.0)
    return weights @ v


def written_afterwards(q, k, v, mask):
    out = (q @ k.mT + mask).softmax(-1) @ v
    q.zero_()
    mask.zero_()
    return out


@pytest.mark.parametrize(
    "function", [scaled_before, mask_made_after_the_product, value_written, written_afterwards]
)
def test_writes_that_one_call_sees_alike(function):
    assert find_one(function).refusal is None
