"""Each head gets the order that suits it, and the blocks that hold most mass in it."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.block_sparse_attention.reference import expand_blocks
from dit_opt.kernels.plan.budgets import allot_blocks
from dit_opt.kernels.plan.orders import VideoLayout, locate_tokens
from dit_opt.kernels.plan.plan import Plan
from dit_opt.kernels.searches.headwise.head_orders import ORDER_NAMES, build_orders
from dit_opt.kernels.searches.mass.blocks import measure_block_mass

from .scenes import CPU, Scene, check_plan, make_inputs, weigh_tokens

plan_operator = torch.ops.ditopt.headwise_plan_v2
search_or_reuse = torch.ops.ditopt.headwise_search_or_reuse_v1
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


def search(scene, q, k, bias, scale, target, by_density, cell=1, boost=None, grid=GRID):
    """The plan, and the order of each head."""
    where = (*grid, scene.video_start, scene.block_q, scene.block_k, cell)
    found = plan_operator(q, k, bias, scale, target, by_density, *where, boost)
    return Plan(*found[:2], *found[3:]), found[2]


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
    chosen, order = search(scene, q, k, bias, scale, 0.8, False)
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
    scene = Scene(tokens=512, video_tokens=512, block_q=64, block_k=64)
    chosen, order = search(scene, q, q, None, 1.0, 0.25, True, cell=4, grid=grid)
    assert [ORDER_NAMES[i] for i in order[0]] == ["raster", "columns", "cubes"]
    assert (chosen.recall > 0.99).all() and (chosen.density <= 0.2501).all()


def test_no_single_order_keeps_as_much():
    scene = Scene(tokens=512, video_tokens=512, block_q=64, block_k=32, heads=6, key_heads=6)
    q, k, _, scale = make_inputs(scene)
    layout = VideoLayout(8, 8, 8, 0, 512)
    orders = build_orders(layout, 64, 32, 1, CPU)
    best, _ = search(scene, q, k, None, scale, 0.3, True, grid=(8, 8, 8))
    for one in orders.orders:
        mass = measure_block_mass(q[:, :, one], k[:, :, one], scale, 64, 32)
        single = allot_blocks(mass, orders.blocks, 0.3, True)
        assert best.recall.mean() >= single.recall.mean() - 1e-3


def test_sampled_rows_find_nearly_what_all_rows_find():
    scene = Scene(tokens=512, video_tokens=512, block_q=64, block_k=32)
    q, k, _, scale = make_inputs(scene)
    layout = VideoLayout(8, 8, 8, 0, 512)
    weights = weigh_tokens(q, k, None, scale)
    kept = {}
    for cell in (1, 4):
        orders = build_orders(layout, 64, 32, cell, CPU)
        chosen, order = search(scene, q, k, None, scale, 0.4, True, cell, grid=(8, 8, 8))
        mask = check_plan(chosen, orders.blocks)
        rows = orders.orders[order.long()]
        moved = weights.gather(2, rows.unsqueeze(-1).expand_as(weights))
        moved = moved.gather(3, rows.unsqueeze(2).expand_as(weights))
        kept[cell] = float((moved * expand_blocks(mask, 512, 512, 64, 32)).sum(-1).mean())
    assert 0.9 * kept[1] < kept[4] <= kept[1] + 1e-3


def test_an_order_is_returned_as_permutations():
    scene = SCENES["text before"]
    order = torch.tensor([[0, 2, 1]], dtype=torch.int32)
    place = (scene.tokens, *GRID, scene.video_start, scene.block_q, scene.block_k)
    rows, inverse = rows_operator(order, *place)
    assert torch.equal(rows, orders_of(scene).orders[order.long()])
    assert torch.equal(rows.gather(-1, inverse), torch.arange(scene.tokens).expand_as(rows))


@pytest.mark.parametrize("name", ["text before", "bias"])
def test_opcheck(name):
    scene = SCENES[name]
    q, k, bias, scale = make_inputs(scene)
    place = (*GRID, scene.video_start, scene.block_q, scene.block_k)
    arguments = (q, k, bias, scale, 0.6, True, *place, 2)
    torch.library.opcheck(plan_operator.default, arguments)
    counts, indices, order, *_ = plan_operator(*arguments)
    torch.library.opcheck(rows_operator.default, (order, scene.tokens, *place))
    words = torch.ops.ditopt.pack_plan_v1(counts, indices, scene.tokens, scene.block_k)
    for fresh in (True, False):
        given = (torch.tensor(fresh), words, order)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(search_or_reuse.default, (*given, *arguments), test_utils=checks)


def test_a_plan_is_searched_or_kept_as_the_operator_is_told():
    scene = SCENES["grouped heads, batch"]
    q, k, bias, scale = make_inputs(scene)
    blocks = (scene.block_q, scene.block_k)
    arguments = (q, k, bias, scale, 0.3, True, *GRID, scene.video_start, *blocks, 16)
    counts, indices, order, recall, density = plan_operator(*arguments)
    words = torch.ops.ditopt.pack_plan_v1(counts, indices, scene.tokens, scene.block_k)
    blank = (torch.zeros_like(words), torch.zeros_like(order))
    found = search_or_reuse(torch.tensor(True), *blank, *arguments)
    for part, expected in zip(found, (counts, indices, order, words, recall, density), strict=True):
        assert torch.equal(part, expected)
    # other queries would have another plan
    kept = search_or_reuse(torch.tensor(False), words, order, -q, *arguments[1:])
    assert torch.equal(kept[0], counts) and torch.equal(kept[2], order)
    assert torch.equal(kept[3], words) and kept[3].data_ptr() != words.data_ptr()
    used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    assert torch.equal(kept[1][used], indices[used])
    assert kept[4].isnan().all() and kept[5].isnan().all()


def test_a_boost_gives_a_head_more():
    scene = SCENES["video only"]
    q, k, _, scale = make_inputs(scene)
    boost = torch.tensor([[1.0, 4.0, torch.inf]])
    plain, _ = search(scene, q, k, None, scale, 0.6, False)
    raised, _ = search(scene, q, k, None, scale, 0.6, False, boost=boost)
    assert raised.density[0, 0] == plain.density[0, 0]
    assert raised.recall[0, 1] >= 0.9 - 1e-4 and raised.density[0, 2] > 0.9999


def test_a_dense_head_leaves_the_others_their_density():
    torch.manual_seed(0)
    scene = Scene(tokens=512, video_tokens=512, block_q=64, block_k=32, heads=4, key_heads=4)
    q, k, _, scale = make_inputs(scene)
    boost = torch.tensor([[torch.inf, 1.0, 1.0, 1.0]])
    goal, grid = (None, scale, 0.25, True), (8, 8, 8)
    plain, _ = search(scene, q, k, *goal, grid=grid)
    raised, _ = search(scene, q, k, *goal, grid=grid, boost=boost)
    assert raised.density[0, 0] > 0.9999
    assert torch.equal(raised.density[:, 1:], plain.density[:, 1:])
    assert torch.equal(raised.recall[:, 1:], plain.recall[:, 1:])


@pytest.mark.parametrize("goal", [(0.7, True), (0.8, False)], ids=str)
def test_an_item_without_any_key_has_a_plan_and_loses_nothing(goal):
    scene = SCENES["grouped heads, batch"]
    q, k, _, scale = make_inputs(scene)
    bias = torch.zeros(2, 1, scene.tokens)
    bias[1] = -torch.inf
    found, order = search(scene, q, k, bias, scale, *goal)
    alone, first = search(scene, q[:1], k[:1], None, scale, *goal)
    check_plan(found, orders_of(scene).blocks)
    assert torch.equal(found.density[:1], alone.density) and torch.equal(order[:1], first)
    assert (found.recall[1] == 1).all() and (order[1] == 0).all()
    if goal[1]:
        assert 0.6 < found.density[1].mean() <= 0.7 + 1e-5


def test_queries_of_another_length_are_refused():
    scene = SCENES["video only"]
    q, k, _, scale = make_inputs(scene)
    with pytest.raises(ValueError, match="plans self-attention over 120 tokens"):
        search(scene, q, k[:, :, 1:], None, scale, 0.5, True)
