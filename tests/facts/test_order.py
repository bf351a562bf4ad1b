from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_opt.facts.order import OrderReason, OrderRefusal, OrderRegion
from tests.orders import GRID, N, attend, find_region, latents, patchify, randn, trace, unpatchify


def names(edges):
    return [(e.node.name, e.dim, tuple(map(int, e.starts)), int(e.total)) for e in edges]


def test_tokens_enter_after_patches_and_leave_before_the_grid():
    def model(x):
        tokens = patchify(x)
        tokens = tokens + attend(tokens * 2)
        return unpatchify(F.layer_norm(tokens, (4,)))

    region = find_region(trace(model, latents()))
    assert isinstance(region, OrderRegion)
    assert region.grid == GRID and region.length == N
    assert names(region.entries) == [("flatten", 2, (0,), N)]
    assert region.tables == ()
    assert [e.node.name for e in region.exits] == ["transpose_1"]
    assert [u.name for u in region.exits[0].users] == ["reshape"]
    assert [n.name for n in region.sites] == ["scaled_dot_product_attention"]


def test_text_stays_in_place_and_masks_are_tables():
    def model(x, text, lengths):
        joint = torch.cat([text, patchify(x)], 1)
        mask = torch.arange(37) < lengths[:, None]
        joint = attend(joint, attn_mask=mask[:, None, None])
        return unpatchify(joint[:, 7:])

    region = find_region(trace(model, latents(), randn(1, 7, 4), torch.tensor([35])))
    assert names(region.entries) == [("flatten", 2, (0,), N)]
    # fx evaluates what does not depend on an input
    assert [(e.starts, e.total) for e in region.tables] == [((7,), 37)]
    assert len(region.exits) == 1


def test_positions_made_in_the_graph_are_tables():
    def model(x, ids):
        tokens = patchify(x) + ids.to(torch.float32)[None, :, None]
        return unpatchify(attend(tokens))

    region = find_region(trace(model, latents(), torch.arange(N)))
    assert names(region.tables) == [("ids", 0, (0,), N)]


def test_packed_tokens_enter_at_the_input_and_leave_at_the_output():
    def model(image, text):
        joint = attend(torch.cat([text, image], 1))
        return joint[:, 7:]

    gm = trace(model, randn(1, N, 4), randn(1, 7, 4))
    region = find_region(gm, grid=GRID)
    assert names(region.entries) == [("image", 1, (0,), N)]
    assert [[u.op for u in e.users] for e in region.exits] == [["output"]]


def test_a_grid_that_is_not_known_is_told():
    def model(image, text):
        return attend(torch.cat([text, image], 1))[:, 7:]

    refusal = find_region(trace(model, randn(1, N, 4), randn(1, 7, 4)))
    assert refusal.reason is OrderReason.NO_GRID
    assert 'options={"grid": (T, H, W)}' in refusal.detail


def test_pooled_tokens_are_alike_in_every_order():
    def model(x):
        tokens = patchify(x)
        tokens = tokens * tokens.mean(1, keepdim=True)
        return unpatchify(attend(tokens)), tokens.amax(1)

    region = find_region(trace(model, latents()))
    assert len(region.entries) == len(region.exits) == 1


def test_shapes_may_be_read_in_any_order():
    def model(x):
        tokens = patchify(x)
        return unpatchify(attend(tokens) / tokens.size(1))

    region = find_region(trace(model, latents()))
    assert len(region.exits) == 1
    (entry,) = region.entries
    assert [u.name for u in entry.users] == ["transpose"]


def test_writes_to_tokens_of_the_region_are_fine():
    def model(x):
        tokens = patchify(x * 2)
        tokens.add_(1)
        return unpatchify(attend(tokens))

    assert isinstance(find_region(trace(model, latents())), OrderRegion)


def causal(x):
    return unpatchify(attend(patchify(x), is_causal=True) + attend(patchify(x)))


def cumulative(x):
    tokens = patchify(x)
    return unpatchify(attend(tokens + tokens.cumsum(1)))


scan = torch.library.custom_op(
    "ditopt_test_order::silu",
    lambda x: x.cumsum(1),
    mutates_args=(),
    schema="(Tensor x) -> Tensor",
)


def cumulative_by_another_name(x):
    tokens = attend(patchify(x))
    return unpatchify(attend(tokens + torch.ops.ditopt_test_order.silu(tokens)))


def temporal_convolution(x, weight):
    tokens = attend(patchify(x)).transpose(1, 2)
    tokens = tokens + F.conv1d(tokens, weight, padding=1, groups=4)
    return unpatchify(attend(tokens.transpose(1, 2)))


def windows(x):
    tokens = patchify(x)
    frames = tokens.reshape(1, 2, 15, 4)
    tokens = tokens + (frames - frames.mean(2, keepdim=True)).reshape(1, N, 4)
    return unpatchify(attend(tokens))


def window_attention(x):
    tokens = patchify(x)
    frames = tokens.reshape(2, 15, 4)
    tokens = tokens + attend(frames).reshape(1, N, 4)
    return unpatchify(attend(tokens))


def lookup(x, ids):
    tokens = patchify(x)
    return unpatchify(attend(tokens + tokens[:, ids]))


def first_row(x):
    tokens = patchify(x)
    shifted = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    return unpatchify(attend(tokens + shifted))


def other_layout(x, w, h, t):
    table = (w[:, None, None] + h[:, None] + t).reshape(N)
    tokens = patchify(x) * table[:, None]
    return unpatchify(attend(patchify(x)) + attend(tokens))


def noise(x):
    return unpatchify(attend(F.dropout(patchify(x), 0.5, True)) + attend(patchify(x)))


def pairs(x, mask):
    return unpatchify(attend(patchify(x), attn_mask=mask))


def written_outside(x):
    tokens = patchify(x)
    tokens.add_(1)
    return unpatchify(attend(tokens)) + x


def folded(x):
    rows = x.permute(0, 2, 3, 4, 1).reshape(2 * N, 4)
    tokens = attend(rows.reshape(2, N, 4))
    return tokens.transpose(1, 2).reshape(2, 4, *GRID)


def two_videos(x, y):
    return unpatchify(attend(patchify(x))), unpatchify(attend(patchify(y)))


def joined(x, y):
    tokens = attend(torch.cat([patchify(x), patchify(y)], 1))
    return unpatchify(tokens[:, :N]), unpatchify(tokens[:, N:])


def no_attention(x):
    return x * 2


X = latents()
# reason: (function, inputs, name of the op that stops the proof)
REFUSED = {
    "cumulative": (cumulative, (X,), OrderReason.UNKNOWN_OP, "cumsum"),
    "cumulative by another name": (
        cumulative_by_another_name, (X,), OrderReason.UNKNOWN_OP, "ditopt_test_order.silu"
    ),
    "temporal convolution": (
        temporal_convolution, (X, randn(4, 1, 3)), OrderReason.CONVOLUTION, "conv1d"
    ),
    "windows": (windows, (X,), OrderReason.REGROUPS, "reshape"),
    "window attention": (window_attention, (X,), OrderReason.SEVERAL_TOKENS, ""),
    "lookup": (lookup, (X, torch.arange(N)), OrderReason.POSITIONS, "getitem"),
    "first row": (first_row, (X,), OrderReason.POSITIONS, "getitem"),
    "pairs": (pairs, (X, randn(1, 1, N, N)), OrderReason.PAIRWISE, "placeholder"),
    "written outside": (written_outside, (X,), OrderReason.IN_PLACE, "add"),
    "folded": (folded, (randn(2, 4, *GRID),), OrderReason.FOLDED, "reshape"),
    "two videos": (two_videos, (X, X + 1), OrderReason.SEVERAL_TOKENS, ""),
    "joined": (joined, (X, X + 1), OrderReason.STACKED, "scaled_dot_product_attention"),
    "no attention": (no_attention, (X,), OrderReason.NO_TOKENS, ""),
    "causal": (causal, (X,), OrderReason.CAUSAL, "scaled_dot_product_attention"),
    "other layout": (
        other_layout,
        (X, randn(5), randn(3), randn(2)),
        OrderReason.CLASHES,
        "mul",
    ),
    "random": (noise, (X,), OrderReason.RANDOM, "dropout"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_node_that_is_not_alike_at_every_token_stops_the_proof(name):
    function, inputs, reason, op = REFUSED[name]
    refusal = find_region(trace(function, *inputs))
    assert isinstance(refusal, OrderRefusal)
    assert (refusal.reason, refusal.op) == (reason, op)
    assert reason.value in str(refusal)
    if op:
        assert refusal.node and f"`{op}` ({refusal.node})" in str(refusal)


def test_windows_stop_the_order_of_the_sites_outside_of_them():
    gm = trace(window_attention, X)
    refusal = find_region(gm, only=[1])
    assert (refusal.reason, refusal.op) == (OrderReason.REGROUPS, "reshape")


def test_what_comes_before_the_order_may_do_anything():
    def model(x, weight):
        tokens = x.flatten(2)
        tokens = tokens + F.conv1d(tokens, weight, padding=1, groups=4)
        return unpatchify(attend(tokens.transpose(1, 2)))

    region = find_region(trace(model, X, randn(4, 1, 3)))
    assert [e.node.name for e in region.entries] == ["flatten", "conv1d"]


def test_every_obstacle_has_a_test():
    tested = {reason for _, _, reason, _ in REFUSED.values()} | {OrderReason.NO_GRID}
    # VALUES only ever ends the order: what was handed out of the graph cannot enter it again.
    passed = {OrderReason.BEGINS, OrderReason.LEAVES, OrderReason.VALUES}
    assert tested | passed == set(OrderReason)
