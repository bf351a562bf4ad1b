from __future__ import annotations

import pytest
import torch

from dit_opt.facts.order import OrderReason, OrderRefusal, OrderRegion
from tests.orders import (
    N,
    apply_order,
    attend,
    find_region,
    latents,
    patchify,
    random_order,
    trace,
    unpatchify,
)


def finish(tokens):
    return unpatchify(attend(tokens))


def copied(x):
    tokens = (x * 2).flatten(2).transpose(1, 2).contiguous()
    tokens.mul_(3)
    return finish(tokens)


def through_a_view(x):
    tokens = attend(patchify(x))
    tokens.transpose(1, 2).add_(1)
    return finish(tokens)


def before_the_order(x):
    base = x * 2
    base.add_(1)
    return finish(patchify(base)) + base


def unread_base(x):
    base = x * 2
    tokens = patchify(base)
    tokens.add_(1)
    return finish(tokens)


def after_the_end(x):
    out = finish(patchify(x))
    out.add_(1)
    return out


def base_read_later(x):
    base = x * 2
    tokens = patchify(base)
    tokens.add_(1)
    return finish(tokens) + base


def base_written_later(x):
    base = x * 2
    tokens = patchify(base)
    base.add_(1)
    return finish(tokens)


def input_written(x):
    tokens = patchify(x)
    tokens.add_(1)
    return finish(tokens)


def grid_view_written(x):
    tokens = attend(patchify(x))
    tokens.transpose(1, 2).reshape(1, 4, 2, 3, 5).add_(1)
    return finish(tokens)


def written_by_position(x):
    tokens = attend(patchify(x))
    tokens.index_fill_(1, torch.tensor([3]), 0.0)
    return finish(tokens)


def flagged(x):
    tokens = attend(patchify(x))
    view = tokens.transpose(1, 2).reshape(1, 4, 2, 3, 5)
    torch.nn.functional.silu(tokens, inplace=True)
    return finish(tokens) + view


def table_added(x):
    tokens = attend(patchify(x)) * 2
    tokens.add_(torch.sin(tokens))
    return finish(tokens)


def by_keyword(x):
    tokens = attend(patchify(x))
    view = torch.flatten(input=tokens, start_dim=2).reshape(1, 2, 15, 4)
    tokens.mul_(2)
    return finish(tokens) + view.sum()


def shape_changed(x):
    tokens = attend(patchify(x)) * 2
    tokens.transpose_(1, 2)
    return finish(tokens.transpose(1, 2))


def by_a_list(x):
    tokens = attend(patchify(x)) * 2
    view = tokens.transpose(1, 2).reshape(1, 4, 2, 3, 5)
    torch._foreach_mul_([tokens], 2.0)
    return finish(tokens) + view


def to_a_list(x):
    tokens = attend(patchify(x)) * 2
    view = tokens.transpose(1, 2).reshape(1, 4, 2, 3, 5)
    torch.frexp(tokens, out=(tokens, torch.empty(tokens.shape, dtype=torch.int32)))
    return finish(tokens) + view


FINE = (table_added, copied, through_a_view, before_the_order, unread_base, after_the_end)
STALE = (
    base_read_later,
    base_written_later,
    input_written,
    grid_view_written,
    flagged,
    by_keyword,
    by_a_list,
    to_a_list,
)


@pytest.mark.parametrize("function", FINE, ids=lambda f: f.__name__)
def test_writes_that_everyone_sees(function):
    gm = trace(function, latents())
    region = find_region(gm)
    assert isinstance(region, OrderRegion), str(region)
    ordered, _ = apply_order(gm, region)
    x, y = latents(), latents()
    plain = gm(x)
    torch.testing.assert_close(ordered(y, *random_order(N)), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize("function", STALE, ids=lambda f: f.__name__)
def test_writes_that_a_copy_would_miss(function):
    refusal = find_region(trace(function, latents()))
    assert refusal.reason is OrderReason.IN_PLACE


def test_a_kernel_of_the_users_that_writes_to_tokens():
    gm = trace(through_a_view, latents())
    write = next(n for n in gm.graph.nodes if n.target == "add_")
    tokens = write.args[0]
    with gm.graph.inserting_before(write):
        # as Dynamo writes a Triton kernel
        gm.graph.call_function(
            torch.ops.higher_order.triton_kernel_wrapper_mutation,
            kwargs={"kernel_idx": 0, "grid": [(1, 1, 1)], "kwargs": {"x": tokens}},
        )
    assert isinstance(find_region(gm), OrderRefusal)


@pytest.mark.parametrize("function", [written_by_position, shape_changed])
def test_writes_that_no_rule_knows(function):
    assert isinstance(find_region(trace(function, latents())), OrderRefusal)
