"""Recognition finds planted heads, its recall is the truth within sampling error, plans execute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_opt.kernels.block_sparse_attention.reference import attend, expand_blocks, expand_lists
from dit_opt.kernels.plan.orders import locate_tokens
from dit_opt.kernels.searches.rainfusion.op import measure_recall, recognize
from dit_opt.kernels.searches.rainfusion.patterns import HeadKind
from dit_opt.kernels.searches.rainfusion.sample import count_rows, draw_sample
from dit_opt.kernels.searches.rainfusion.tables import build_tables
from dit_opt.kernels.token_order import gather_tokens, scatter_tokens

CPU = torch.device("cpu")
BLOCKS = (32, 16)
PLANTED = [HeadKind.SPATIAL, HeadKind.TEMPORAL, HeadKind.TEXTURAL, HeadKind.DENSE]
recognize_op = torch.ops.ditopt.rainfusion_recognize_v1
plan_op = torch.ops.ditopt.rainfusion_plan_v1

# T, H, W, video_start, N: no text, text on both sides, ragged, one frame.
GRIDS = [(8, 8, 8, 0, 512), (5, 9, 7, 11, 340), (7, 10, 6, 0, 443), (1, 20, 22, 0, 440)]


def embed(size, width):
    """Features of positions whose inner product falls off with distance over `width`."""
    distance = torch.arange(size)[:, None] - torch.arange(size)
    values, vectors = torch.linalg.eigh(torch.exp(-((distance / width) ** 2)))
    return vectors * values.clamp_min(0).sqrt()


def plant(grid, strength=24.0, width=0.7):
    """q and k [1, 4, N, D], scale 1: a spatial, a temporal, a checkerboard and a diffuse head."""
    layout = build_tables(*grid, *BLOCKS, CPU).layout
    t, h, w = locate_tokens(layout).unbind(1)
    time = embed(layout.frames, width)[t]
    place = torch.cat([embed(layout.height, width)[h], embed(layout.width, width)[w]], 1)
    board = torch.stack([torch.ones(len(t)), ((h - w) % 4 == 0).float()], 1)
    dim = max(time.shape[1], place.shape[1], 2)
    q, k = torch.zeros(2, 1, 4, layout.tokens, dim)
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    for x in (q, k):
        x[0, 0, video, : time.shape[1]] = time * strength**0.5
        x[0, 1, video, : place.shape[1]] = place * strength**0.5
    q[0, 2, video, 1], k[0, 2, video, :2] = strength, board
    return q, k


def expand_plan(plan, tokens):
    """Which keys each query keeps, bool [B, H, N, N], in the model's own order."""
    counts, indices, _, inverse = plan
    mask = expand_blocks(expand_lists(counts, indices, indices.shape[-1]), tokens, tokens, *BLOCKS)
    rows = inverse[..., None].expand_as(mask)
    return mask.gather(-2, rows).gather(-1, inverse[..., None, :].expand_as(mask))


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid[0] > 1])
def test_planted_heads_are_recognised(grid):
    q, k = plant(grid)
    tables = build_tables(*grid, *BLOCKS, CPU)
    choice, _ = recognize(q, k, None, 1.0, 0.9, False, tables)
    assert choice.dtype == torch.int32
    assert [tables.patterns[c].kind for c in choice[0].tolist()] == PLANTED
    # The checkerboard is of step 4; its subset of step 8 holds half of it.
    assert tables.names[choice[0, 2]] == "textural 4"


def test_one_frame_has_windows_and_checkerboards():
    q, k = plant(GRIDS[3])
    tables = build_tables(*GRIDS[3], *BLOCKS, CPU)
    choice, _ = recognize(q[:, 1:], k[:, 1:], None, 1.0, 0.9, False, tables)
    assert [tables.patterns[c].kind for c in choice[0].tolist()] == PLANTED[1:]


@pytest.mark.parametrize("grid", GRIDS)
def test_recall_is_exact_for_each_sampled_row(grid):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, grid[-1], 16), torch.randn(2, 2, grid[-1], 16)
    bias = torch.randn(2, 1, grid[-1])
    bias[1, :, -3:] = -torch.inf
    tables = build_tables(*grid, *BLOCKS, CPU)
    recall = measure_recall(q, k, bias, 0.3, tables)
    rows = draw_sample(tables, count_rows(tables.layout)).rows
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 + bias[:, :, None]
    weights = scores.double().softmax(-1)
    for c in range(len(tables.names)):
        kept = expand_plan(plan_op(torch.full((2, 4), c), grid[-1], *grid[:4], *BLOCKS), grid[-1])
        expected = (weights * kept).sum(-1)[:, :, rows]
        torch.testing.assert_close(recall[:, :, c].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("target", [0.7, 0.9])
def test_the_plan_keeps_the_mass_that_was_asked_for(grid, target):
    q, k = (torch.cat(x) for x in zip(plant(grid), plant(grid, 9.0, 1.5), strict=True))
    choice, recall, density = recognize_op(q, k, None, 1.0, target, False, *grid[:4], *BLOCKS)
    kept = expand_plan(plan_op(choice, grid[-1], *grid[:4], *BLOCKS), grid[-1])
    torch.testing.assert_close(density, kept.float().mean((2, 3)), rtol=1e-5, atol=0)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    by_row = (weights * kept).sum(-1)[:, :, grid[3] : grid[3] + grid[0] * grid[1] * grid[2]]
    error = by_row.std(-1) / 32**0.5
    assert (by_row.mean(-1) >= target - 2 * error).all()
    assert ((by_row.mean(-1) - recall).abs() <= 3 * error + 1e-5).all()
    if grid[0] > 1:
        assert density.min() < 0.5


def test_a_higher_target_never_keeps_less():
    q, k = plant(GRIDS[0], 9.0, 1.5)
    tables = build_tables(*GRIDS[0], *BLOCKS, CPU)
    choices = [
        recognize(q, k, None, 1.0, target, False, tables)[0]
        for target in (0.3, 0.6, 0.9, 0.99, 1.0)
    ]
    assert (torch.stack(choices).diff(dim=0) >= 0).all()
    assert (choices[0] < choices[-1]).any()


def test_a_density_budget_buys_the_best_recall():
    q, k = plant(GRIDS[0], 9.0, 1.5)
    tables = build_tables(*GRIDS[0], *BLOCKS, CPU)
    choice, recall = recognize(q, k, None, 1.0, 0.4, True, tables)
    affordable = tables.density <= 0.4
    assert 1 < affordable.sum() < len(affordable)
    assert affordable[choice].all()
    best = recall[..., affordable].amax(-1)
    assert torch.equal(recall.gather(-1, choice.long()[..., None]).squeeze(-1), best)
    cheapest, _ = recognize(q, k, None, 1.0, 1e-3, True, tables)
    assert not cheapest.any()


def test_query_heads_of_a_group_choose_for_themselves():
    q, k = plant(GRIDS[0])
    # One key head that serves a spatial, a temporal and a diffuse query head.
    key = torch.cat([k[:, :1], k[:, 1:2]], -1)
    zero = torch.zeros_like(q[:, :1])
    queries = [(q[:, :1], zero), (zero, q[:, 1:2]), (zero, zero)]
    grouped = torch.cat([torch.cat(pair, -1) for pair in queries], 1)
    tables = build_tables(*GRIDS[0], *BLOCKS, CPU)
    choice, _ = recognize(grouped, key, None, 1.0, 0.9, False, tables)
    kinds = [tables.patterns[c].kind for c in choice[0].tolist()]
    assert kinds == [HeadKind.SPATIAL, HeadKind.TEMPORAL, HeadKind.DENSE]


def test_masked_keys_count_for_nothing():
    grid = GRIDS[1]
    q, k = plant(grid)
    k[:, :, -4:] = 50.0 * q[:, :, 20:24].sign()
    bias = torch.zeros(1, 1, grid[-1])
    bias[..., -4:] = -torch.inf
    tables = build_tables(*grid, *BLOCKS, CPU)
    choice, recall = recognize(q, k, bias, 1.0, 0.9, False, tables)
    expected, _ = recognize(*plant(grid), None, 1.0, 0.9, False, tables)
    assert torch.equal(choice, expected)
    _, empty = recognize(q, k, torch.full_like(bias, -torch.inf), 1.0, 0.9, False, tables)
    assert (empty == 1).all() and recall.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_batches_change_nothing(dtype):
    torch.manual_seed(1)
    grid = GRIDS[1]
    q, k = torch.randn(2, 3, 4, grid[-1], 16).to(dtype)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    tables = build_tables(*grid, *BLOCKS, CPU)
    whole = measure_recall(q, k, None, 0.5, tables)
    torch.testing.assert_close(
        measure_recall(*strided, None, 0.5, tables), whole, rtol=1e-5, atol=1e-6
    )
    for item in range(3):
        alone = measure_recall(q[item : item + 1], k[item : item + 1], None, 0.5, tables)
        torch.testing.assert_close(alone[0], whole[item], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_plan_runs_in_the_kernel(grid):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 3, grid[-1], 16)
    tables = build_tables(*grid, *BLOCKS, CPU)
    candidates = len(tables.names)
    choice = torch.tensor([[0, 1, 2], [3, candidates - 2, candidates - 1]], dtype=torch.int32)
    plan = plan_op(choice, grid[-1], *grid[:4], *BLOCKS)
    counts, indices, rows, inverse = plan
    ordered = (gather_tokens(x, rows) for x in (q, k, v))
    out, _ = attend(*ordered, counts, indices, None, 0.25, *BLOCKS, dtype=torch.float64)
    kept = expand_plan(plan, grid[-1])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=kept, scale=0.25)
    torch.testing.assert_close(scatter_tokens(out, inverse), expected, rtol=1e-5, atol=1e-5)
    # The last head is dense.
    assert kept[1, 2].all() and not kept[0, 0].all()


def test_nothing_in_recognition_reads_the_device():
    tables = build_tables(*GRIDS[1], *BLOCKS, torch.device("meta"))
    q, k = torch.empty(2, 2, 4, GRIDS[1][-1], 16, device="meta")
    bias = torch.empty(1, 1, GRIDS[1][-1], device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        q.sum().item()
    for by_density in (False, True):
        choice, recall = recognize(q, k, bias, 0.25, 0.5, by_density, tables)
        assert choice.shape == (2, 4) and recall.shape == (2, 4, len(tables.names))


def test_schemas_and_fakes_agree():
    grid = GRIDS[1]
    q, k = torch.randn(2, 2, 4, grid[-1], 16)
    bias = torch.zeros(2, 1, grid[-1])
    where = (*grid[:4], *BLOCKS)
    torch.library.opcheck(recognize_op, (q, k, bias, 0.25, 0.9, False, *where))
    choice = torch.zeros(2, 4, dtype=torch.int32)
    torch.library.opcheck(plan_op, (choice, grid[-1], *where))


def test_one_graph_serves_every_resolution():
    graphs = []

    def count_graphs(gm, _):
        graphs.append(gm)
        return gm

    @torch.compile(backend=count_graphs, dynamic=True, fullgraph=True)
    def route(latents, q, k):
        frames, height, width = latents.shape
        where = (frames, height, width, q.shape[2] - frames * height * width, *BLOCKS)
        choice, _, _ = recognize_op(q, k, None, 0.25, 0.9, False, *where)
        return plan_op(choice, q.shape[2], *where)

    for grid in ((3, 8, 9), (4, 10, 7)):
        tokens = grid[0] * grid[1] * grid[2] + 5
        q, k = torch.randn(2, 1, 2, tokens, 16)
        counts, _, rows, _ = route(torch.empty(grid), q, k)
        assert counts.shape == (1, 2, -(-tokens // 32)) and rows.shape == (1, 2, tokens)
    assert len(graphs) == 1


def test_candidates_are_named_by_their_kinds():
    names = build_tables(8, 8, 8, 0, 512, *BLOCKS, CPU).names
    assert {name.split()[0] for name in names} == {kind.value for kind in HeadKind}


def test_bad_input_is_refused():
    q = torch.zeros(1, 4, 60, 8)
    tables = build_tables(3, 4, 5, 0, 60, *BLOCKS, CPU)
    with pytest.raises(ValueError, match="multiplies to 72 tokens"):
        recognize_op(q, q, None, 1.0, 0.9, False, 3, 4, 6, 0, *BLOCKS)
    with pytest.raises(ValueError, match="60 queries and 30 keys"):
        measure_recall(q, q[:, :, :30], None, 1.0, tables)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        measure_recall(q, q[:, :3], None, 1.0, tables)
    for target in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            recognize(q, q, None, 1.0, target, False, tables)


@pytest.mark.parametrize("by_density", [False, True])
def test_a_head_without_anything_to_drop_is_dense(by_density):
    """Its sampled rows would lose nothing to a pattern of their own."""
    q, k = plant(GRIDS[0], strength=2000.0)
    tables = build_tables(*GRIDS[0], *BLOCKS, CPU)
    plain, recall = recognize(q, k, None, 1.0, 0.4, by_density, tables)
    assert (recall[0, 0, :-1] == 1).any()
    boost = torch.ones(1, 4)
    boost[0, 0] = torch.inf
    choice, _ = recognize(q, k, None, 1.0, 0.4, by_density, tables, boost)
    assert choice[0, 0] == len(tables.names) - 1
    assert torch.equal(choice[0, 1:], plain[0, 1:])
