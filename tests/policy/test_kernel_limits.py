"""What the kernel does not take runs under Inductor alone; it must not fail to compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import config

from dit_opt.decisions import AttentionReason
from dit_opt.facts.sites import find_sites
from dit_opt.facts.tokens import find_tokens
from dit_opt.policy.kernel_limits import find_limit
from tests.graphs import capture_one

X = torch.randn(2, 4, 192, 16)


def attend(q, k=None, v=None, **kwargs):
    k = q if k is None else k
    return F.scaled_dot_product_attention(q, k, k if v is None else v, **kwargs)


def limit(function, *args, **kwargs):
    gm = capture_one(function, *args, **kwargs)
    (site,) = find_sites(gm.graph)
    assert site.refusal is None
    return find_limit(site, find_tokens(gm.graph, [site]).layouts[site.node])


@pytest.mark.parametrize(
    "function, q",
    [
        (attend, X),
        (attend, X[0]),
        # one key head for all is a group
        (lambda q: attend(q, q[:, :1]), X),
        (lambda q: attend(q, q[:, ::2], enable_gqa=True), X),
    ],
    ids=["4-D", "3-D", "one key head", "grouped"],
)
@pytest.mark.parametrize("dynamic", [False, None])
def test_what_the_kernel_takes(function, q, dynamic):
    assert limit(function, q, dynamic=dynamic) is None


@pytest.mark.parametrize(
    "function, q",
    [
        (attend, X.unflatten(1, (2, 2))),
        (attend, X[0, 0]),
        (lambda q: attend(q, q[:1]), X),
        (lambda q: attend(q[:1], q), X),
        (lambda q: attend(q, q, q[:1]), X),
        (lambda q: attend(q[:, :1], q), X),
        (lambda q: attend(q, q, q[:, :1]), X),
        (lambda q: attend(q, q[0]), X),
    ],
    ids=[
        "5-D",
        "2-D",
        "keys of batch 1",
        "queries of batch 1",
        "values of batch 1",
        "one query head",
        "one value head",
        "keys without a batch",
    ],
)
def test_other_shapes_have_a_reason(function, q):
    reason, detail = limit(function, q)
    assert reason is AttentionReason.UNSUPPORTED_SHAPE and "192, 16]" in detail


def test_a_head_dimension_that_changes_has_a_reason_and_adds_no_guard():
    gm = capture_one(attend, X, dynamic=True)
    (site,) = find_sites(gm.graph)
    size = site.query.meta["example_value"].shape[-1]
    guards = size.node.shape_env.guards
    before = len(guards)
    reason, detail = find_limit(site, None)
    assert reason is AttentionReason.UNSUPPORTED_HEAD_DIM and detail == f"D={size.node.expr}"
    assert len(guards) == before


@pytest.mark.parametrize("dim", [8, 264])
def test_head_dimensions_out_of_range(dim):
    assert limit(attend, X.new_ones(1, 2, 64, dim)) == (
        AttentionReason.UNSUPPORTED_HEAD_DIM,
        f"D={dim}",
    )


@pytest.mark.parametrize("scale", [-0.25, 0.0, float("inf")])
def test_a_scale_must_be_positive(scale):
    reason, detail = limit(lambda q: attend(q, scale=scale), X)
    assert reason is AttentionReason.UNSUPPORTED_SCALE and str(scale) in detail
    assert limit(lambda q: attend(q, scale=0.25), X) is None


def test_a_dtype_is_that_of_the_call_too():
    assert limit(attend, X.double()) == (AttentionReason.UNSUPPORTED_DTYPE, "torch.float64")
    gm = capture_one(attend, X)
    (site,) = find_sites(gm.graph)
    # as autocast to a dtype of its own leaves it
    site.node.meta["example_value"] = site.node.meta["example_value"].to(torch.float8_e4m3fn)
    assert find_limit(site, None) == (AttentionReason.UNSUPPORTED_DTYPE, "torch.float8_e4m3fn")


def test_sizes_made_in_the_graph_have_a_reason():
    def cut(x, n):
        count = n.item()
        torch._check(count >= 2)
        torch._check(count <= x.shape[2])
        return attend(x[:, :, :count])

    with config.patch(capture_scalar_outputs=True):
        reason, detail = limit(cut, X, torch.tensor(100), dynamic=False)
    assert reason is AttentionReason.UNSUPPORTED_SIZE and detail


def test_sizes_that_an_input_tells_have_none():
    def join(x, y):
        return attend(torch.cat([x, y], 2))

    linear = torch.nn.Linear(16, 16).requires_grad_(False)
    assert limit(lambda x, y: join(linear(x), linear(y)), X, X[:, :, :70], dynamic=True) is None
