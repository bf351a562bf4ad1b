"""Each head gets the order that suits it, and the blocks that hold most mass in it."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.reference import expand_blocks
from dit_opt.kernels.routers import headwise, oracle
from dit_opt.kernels.routers.head_orders import ORDER_NAMES, build_orders
from dit_opt.kernels.routers.orders import VideoLayout, locate_tokens

from .scenes import CPU, Scene, check_plan, make_inputs, weigh_tokens

plan_operator = torch.ops.ditopt.headwise_plan_v1
refresh_operator = torch.ops.ditopt.headwise_refresh_v1
rows_operator = torch.ops.ditopt.headwise_rows_v1
GRID = (4, 5, 6)
SCENES = {
    "video only": Scene(tokens=120, video_tokens=120),
    "text before": Scene(tokens=141, video_start=21, video_tokens=120),
    "text around": Scene(tokens=169, video_start=9, video_tokens=120),
    "grouped heads, batch": Scene(batch=2, heads=4, key_heads=2, tokens=131, video_tokens=120),
    "bias": Scene(batch=2, tokens=150, video_tokens=120, bias=True),
}


def lay(scene):
    return VideoLayout(*GRID, scene.video_start, scene.tokens)


def orders_of(scene, cell=1):
    return build_orders(lay(scene), scene.block_q, scene.block_k, cell, CPU)


def weigh_kept(scene, chosen, order):
    """The share of each row's mass in the lists, [B, H, N] in the order of each head."""
    q, k, bias, scale = make_inputs(scene)
    orders = orders_of(scene)
    mask = check_plan(chosen, orders.blocks)
    kept = expand_blocks(mask, scene.tokens, scene.tokens, scene.block_q, scene.block_k)
    weights = weigh_tokens(q, k, bias, scale)
    rows = orders.orders[order.long()]
    weights = weights.gather(2, rows.unsqueeze(-1).expand_as(weights))
    weights = weights.gather(3, rows.unsqueeze(2).expand_as(weights))
    return (weights * kept).sum(-1)


@pytest.mark.parametrize("name", SCENES)
def test_the_promised_mass_is_kept_in_the_order_of_each_head(name):
    scene = SCENES[name]
    q, k, bias, scale = make_inputs(scene)
    orders = orders_of(scene)
    chosen, order = headwise.plan(q, k, scale, orders, quality=0.8, key_bias=bias)
    assert order.dtype == torch.int32 and order.shape == (scene.batch, scene.heads)
    # Blocks with text are dense by rule and do not count; text stands behind the video.
    dense = orders_of(scene).blocks.always_kept.all(-1).sum()
    video = scene.tokens if dense == 0 else scene.video_tokens // scene.block_q * scene.block_q
    share = weigh_kept(scene, chosen, order)[:, :, :video].mean(-1)
    torch.testing.assert_close(chosen.recall.double(), share, rtol=1e-3, atol=1e-3)
    assert (share >= 0.8 - 1e-3).all() and (chosen.density < 1).any()


def test_heads_take_the_order_in_which_they_are_sparse():
    grid = (8, 8, 8)
    t, h, w = locate_tokens(VideoLayout(*grid, 0, 512)).unbind(1)
    one_hot = torch.nn.functional.one_hot
    same_frame = one_hot(t, 64).float()
    same_place = one_hot(h * 8 + w, 64).float()
    same_cube = one_hot((t // 4 * 2 + h // 4) * 2 + w // 4, 64).float()
    q = torch.stack([same_frame, same_place, same_cube])[None] * 8
    orders = build_orders(VideoLayout(*grid, 0, 512), 64, 64, 4, CPU)
    chosen, order = headwise.plan(q, q, 1.0, orders, density=0.25)
    assert [ORDER_NAMES[i] for i in order[0]] == ["raster", "columns", "cubes"]
    assert (chosen.recall > 0.99).all() and (chosen.density <= 0.2501).all()


def test_no_single_order_keeps_as_much():
    scene = Scene(tokens=512, video_tokens=512, block_q=64, block_k=32, heads=6, key_heads=6)
    q, k, _, scale = make_inputs(scene)
    layout = VideoLayout(8, 8, 8, 0, 512)
    orders = build_orders(layout, 64, 32, 1, CPU)
    best, _ = headwise.plan(q, k, scale, orders, density=0.3)
    for one in orders.orders:
        rows = one.expand(1, 6, -1)[..., None].expand_as(q)
        single = oracle.plan(
            q.gather(2, rows), k.gather(2, rows), scale, orders.blocks, density=0.3, spread="even"
        )
        assert best.recall.mean() >= single.recall.mean() - 1e-3


def test_sampled_rows_find_nearly_what_all_rows_find():
    scene = Scene(tokens=512, video_tokens=512, block_q=64, block_k=32)
    q, k, _, scale = make_inputs(scene)
    layout = VideoLayout(8, 8, 8, 0, 512)
    weights = weigh_tokens(q, k, None, scale)
    kept = {}
    for cell in (1, 4):
        orders = build_orders(layout, 64, 32, cell, CPU)
        chosen, order = headwise.plan(q, k, scale, orders, density=0.4)
        mask = check_plan(chosen, orders.blocks)
        rows = orders.orders[order.long()]
        moved = weights.gather(2, rows.unsqueeze(-1).expand_as(weights))
        moved = moved.gather(3, rows.unsqueeze(2).expand_as(weights))
        kept[cell] = float((moved * expand_blocks(mask, 512, 512, 64, 32)).sum(-1).mean())
    assert 0.9 * kept[1] < kept[4] <= kept[1] + 1e-3


@pytest.mark.parametrize("name", ["text before", "bias"])
def test_the_operators_return_the_plan_and_the_permutations(name):
    scene = SCENES[name]
    q, k, bias, scale = make_inputs(scene)
    place = (*GRID, scene.video_start, scene.block_q, scene.block_k)
    arguments = (q, k, bias, scale, 0.6, True, *place, 2)
    expected, order = headwise.plan(q, k, scale, orders_of(scene, 2), density=0.6, key_bias=bias)
    found = plan_operator(*arguments)
    wanted = (expected.counts, expected.indices, order, expected.recall, expected.density)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
    rows, inverse = rows_operator(order, scene.tokens, *place)
    assert torch.equal(rows.gather(-1, inverse), torch.arange(scene.tokens).expand_as(rows))
    torch.library.opcheck(plan_operator.default, arguments)
    torch.library.opcheck(rows_operator.default, (order, scene.tokens, *place))


def test_a_plan_is_searched_or_kept_as_the_operator_is_told():
    scene = SCENES["grouped heads, batch"]
    q, k, bias, scale = make_inputs(scene)
    blocks = (scene.block_q, scene.block_k)
    search = (q, k, bias, scale, 0.3, True, *GRID, scene.video_start, *blocks)
    counts, indices, order, recall, density = plan_operator(*search)
    words = torch.ops.ditopt.pack_plan_v1(counts, indices, scene.tokens, scene.block_k)
    blank = (torch.zeros_like(words), torch.zeros_like(order))
    found = refresh_operator(torch.tensor(True), *blank, *search)
    for part, expected in zip(found, (counts, indices, order, words, recall, density), strict=True):
        assert torch.equal(part, expected)
    # other queries would have another plan
    kept = refresh_operator(torch.tensor(False), words, order, -q, *search[1:])
    assert torch.equal(kept[0], counts) and torch.equal(kept[2], order)
    assert torch.equal(kept[3], words) and kept[3].data_ptr() != words.data_ptr()
    used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    assert torch.equal(kept[1][used], indices[used])
    assert kept[4].isnan().all() and kept[5].isnan().all()


def test_a_boost_gives_a_head_more():
    scene = SCENES["video only"]
    q, k, _, scale = make_inputs(scene)
    boost = torch.tensor([[1.0, 4.0, torch.inf]])
    plain, _ = headwise.plan(q, k, scale, orders_of(scene), quality=0.6)
    raised, _ = headwise.plan(q, k, scale, orders_of(scene), quality=0.6, boost=boost)
    assert raised.density[0, 0] == plain.density[0, 0]
    assert raised.recall[0, 1] >= 0.9 - 1e-4 and raised.density[0, 2] > 0.9999


def test_a_dense_head_leaves_the_others_their_density():
    torch.manual_seed(0)
    scene = Scene(tokens=512, video_tokens=512, block_q=64, block_k=32, heads=4, key_heads=4)
    q, k, _, scale = make_inputs(scene)
    orders = build_orders(VideoLayout(8, 8, 8, 0, 512), 64, 32, 1, CPU)
    boost = torch.tensor([[torch.inf, 1.0, 1.0, 1.0]])
    plain, _ = headwise.plan(q, k, scale, orders, density=0.25)
    raised, _ = headwise.plan(q, k, scale, orders, density=0.25, boost=boost)
    assert raised.density[0, 0] > 0.9999
    assert torch.equal(raised.density[:, 1:], plain.density[:, 1:])
    assert torch.equal(raised.recall[:, 1:], plain.recall[:, 1:])


@pytest.mark.parametrize("target", [{"density": 0.7}, {"quality": 0.8}], ids=str)
@pytest.mark.parametrize("spread", ["need", "even", "equal"])
def test_an_item_without_any_key_has_a_plan_and_loses_nothing(target, spread):
    scene = SCENES["grouped heads, batch"]
    q, k, _, scale = make_inputs(scene)
    bias = torch.zeros(2, 1, scene.tokens)
    bias[1] = -torch.inf
    orders = orders_of(scene)
    found, order = headwise.plan(q, k, scale, orders, key_bias=bias, spread=spread, **target)
    alone, first = headwise.plan(q[:1], k[:1], scale, orders, spread=spread, **target)
    check_plan(found, orders.blocks)
    assert torch.equal(found.density[:1], alone.density) and torch.equal(order[:1], first)
    assert (found.recall[1] == 1).all() and (order[1] == 0).all()
    if "density" in target:
        assert 0.6 < found.density[1].mean() <= 0.7 + 1e-5


def test_queries_of_another_length_are_refused():
    scene = SCENES["video only"]
    q, k, _, scale = make_inputs(scene)
    with pytest.raises(ValueError, match="plans self-attention over 120 tokens"):
        headwise.plan(q[:, :, 1:], k, scale, orders_of(scene), density=0.5)
