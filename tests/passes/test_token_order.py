from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_opt.decisions import RewriteReason
from dit_opt.facts.order import OrderRegion
from dit_opt.options import Options
from dit_opt.passes.sparse_attention import SparseAttention
from dit_opt.passes.token_order import TokenOrder, order_tokens
from dit_opt.program.edit import append_placeholder, copy_graph
from dit_opt.program.modes import Mode
from dit_opt.program.program import Program
from tests.graphs import capture_tiny
from tests.orders import (
    CHANNELS,
    GRID,
    N,
    apply_order,
    attend,
    find_region,
    latents,
    move_region,
    patchify,
    randn,
    random_order,
    trace,
    unpatchify,
)
from tests.programs import count_calls, run_passes
from zoo import small


@dataclass
class Comparing:
    """A backend that runs each graph plain, in a random order, and so with its tables left plain.

    `tokens` is to be set to the number of video tokens before each call.
    """

    tokens: int
    grid: tuple[int, int, int] | None = None
    regions: list[OrderRegion] = field(default_factory=list)
    gathers: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    untabled: list[float] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, _: list[Any]):
        plain = copy_graph(gm)
        before = count_guards(plain)
        region = find_region(plain, self.grid)
        assert isinstance(region, OrderRegion), str(region)
        ordered, count = apply_order(plain, region)
        spoiled, _ = apply_order(plain, replace(region, tables=()))
        self.regions.append(region)
        self.gathers.append(count_gathers(ordered) - count_gathers(plain))
        assert count == self.gathers[-1]
        assert count_guards(plain) == before

        def run(*args):
            order = random_order(self.tokens)
            wanted = plain(*args)
            for graph, errors in ((ordered, self.errors), (spoiled, self.untabled)):
                (out,) = graph(*args, *order)
                errors.append(float((out - wanted[0]).norm() / wanted[0].norm()))
            return wanted

        return run


def count_gathers(gm):
    return len(gm.graph.find_nodes(op="call_function", target=torch.index_select))


def count_guards(gm):
    values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    environments = {v.node.shape_env for v in values if isinstance(v, torch.SymInt)}
    return sum(len(e.guards) + len(e.deferred_runtime_asserts) for e in environments)


# model: tables that enter the order beside the tokens
TABLES = {
    # rotary tables: cosines and sines
    "wan": 2,
    "cogvideox_rope": 2,
    # the positions of each axis, and those that the key mask compares with lengths
    "hunyuan_video": 4,
    "ltx": 1,
    "flux": 1,
    "sd3": 1,
    "dit": 1,
}


@pytest.mark.parametrize("build", small.ALL, ids=lambda f: f.__name__)
def test_models_run_in_any_order_of_their_tokens(build):
    tiny = build()
    grid = tiny.grid or (1, 4, 5)
    backend = Comparing(grid[0] * grid[1] * grid[2], None if tiny.grid else grid)
    torch.compiler.reset()
    tiny(torch.compile(tiny.model, backend=backend))
    torch.compiler.reset()
    ((region,), (gathers,)) = backend.regions, backend.gathers
    assert region.grid == grid and region.length == backend.tokens
    assert (len(region.entries), len(region.exits)) == (1, 1)
    assert len(region.tables) == TABLES[tiny.name]
    assert gathers == 2 + len(region.tables)
    assert backend.errors[0] < 1e-5
    # the comparison would show an order that is not followed everywhere
    assert backend.untabled[0] > 1e-3


@pytest.mark.parametrize("build", [small.wan, small.cogvideox, small.hunyuan_video])
def test_sizes_may_be_symbols(build):
    backend = Comparing(60)
    tiny = build(layers=1)
    torch.compiler.reset()
    compiled = torch.compile(tiny.model, backend=backend, dynamic=True)
    tiny(compiled)
    backend.tokens = 2 * 5 * 7
    build(grid=(2, 5, 7), layers=1)(compiled)
    torch.compiler.reset()
    # some models make Dynamo fix a size of the grid, and so a second graph
    assert not any(region.length.is_Integer for region in backend.regions)
    assert len(backend.regions) == 1 or build is not small.wan
    assert len(backend.errors) == 2 and max(backend.errors) < 1e-5
    assert min(backend.untabled) > 1e-3


def run_ordered(gm, region, *inputs):
    """(plain results, results in a random order, the rewritten graph)."""
    ordered, _ = apply_order(gm, region)
    plain = gm(*(x.clone() for x in inputs))
    return plain, ordered(*(x.clone() for x in inputs), *random_order(N)), ordered


def test_text_stays_where_it_is():
    def model(x, text, table):
        joint = torch.cat([text, patchify(x)], 1) * table[:, None]
        return unpatchify(attend(joint + joint.sin() * table[:, None])[:, 7:])

    inputs = latents(), randn(1, 7, 4), randn(37)
    gm = trace(model, *inputs)
    region = find_region(gm)
    plain, moved, ordered = run_ordered(gm, region, *inputs)
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-5)
    names = [n.name for n in ordered.graph.nodes]
    assert "flatten_ordered" in names and "table_ordered" in names
    (gathered,) = (n for n in ordered.graph.nodes if n.name == "table_ordered")
    rows = ordered.graph.find_nodes(op="call_function", target=torch.cat)[0]
    assert gathered.args == (gathered.args[0], 0, rows)
    value = gathered.meta["example_value"]
    assert value.shape == (37,) and value.is_contiguous()


def test_what_is_outside_reads_what_it_read():
    def model(x):
        tokens = patchify(x)
        seen = x.flatten(2).cumsum(-1).reshape(1, CHANNELS, *GRID)
        return unpatchify(attend(tokens)) + seen, tokens.cumsum(1)

    gm = trace(model, latents())
    region = find_region(gm)
    assert [u.name for e in region.exits for u in e.users] != []
    plain, moved, _ = run_ordered(gm, region, latents())
    for a, b in zip(moved, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_order_that_is_made_too_late():
    gm = trace(lambda x: unpatchify(attend(patchify(x * 2))), latents())
    region = find_region(gm)
    copy = copy_graph(gm)
    example = copy.graph.find_nodes(op="placeholder")[0].meta["example_value"]
    inverse = append_placeholder(copy, "inverse", example.new_empty(N, dtype=torch.int64))
    (output,) = copy.graph.find_nodes(op="output")
    with copy.graph.inserting_before(output):
        late = copy.graph.call_function(torch.argsort, (inverse,))
    at = {n.name: n for n in copy.graph.nodes}
    with pytest.raises(ValueError, match=r"argsort of the tokens is made after transpose"):
        order_tokens(copy, move_region(region, at), late, inverse)
    copy = copy_graph(gm)
    order = append_placeholder(copy, "order", example.new_empty(N, dtype=torch.int64))
    (output,) = copy.graph.find_nodes(op="output")
    with copy.graph.inserting_before(output):
        late = copy.graph.call_function(torch.argsort, (order,))
    at = {n.name: n for n in copy.graph.nodes}
    with pytest.raises(ValueError, match=r"inverse order argsort .* after reshape"):
        order_tokens(copy, move_region(region, at), order, late)


WEIGHT = randn(CHANNELS, CHANNELS)
KERNEL = randn(CHANNELS, 1, 3)
TEXT = randn(1, 3, CHANNELS)
TABLE = randn(N, CHANNELS)


def roll_frames(t):
    return t.reshape(1, *GRID, CHANNELS).roll(1, 1).reshape(1, N, CHANNELS)


def mix_frames(t):
    frames = t.reshape(1, GRID[0], -1, CHANNELS)
    return t + (frames - frames.mean(1, keepdim=True)).flatten(1, 2)


def joint(t):
    both = torch.cat([TEXT + t[:, :1] * 0, t], 1)
    return attend(both)[:, 3:]


def split_joint(t, table):
    both = attend(torch.cat([t + table, t], 1))
    first, second = both.split([N, N], 1)
    return first * second.sigmoid()


# What a layer may do to [1, N, C] tokens, given a [N, C] table; some act by position.
LAYERS = {
    "linear": lambda t, table: F.linear(t, WEIGHT),
    "norm": lambda t, table: F.layer_norm(t, (CHANNELS,)),
    "attention": lambda t, table: t + attend(t),
    "cross attention": lambda t, table: t + attend(t, TEXT.clone() + 0 * t.mean()),
    "decomposed": lambda t, table: t + (t @ t.mT).softmax(-1) @ t,
    "table": lambda t, table: t + table,
    "positions": lambda t, table: t * table.cumsum(0),
    "in place": lambda t, table: (t * 1).add_(table),
    "gate": lambda t, table: t * t.mean(1, keepdim=True).sigmoid(),
    "norm over tokens": lambda t, table: t / (t.norm(dim=1, keepdim=True) + 1),
    "channels first": lambda t, table: t.transpose(1, 2).softmax(-1).transpose(1, 2) + t,
    "heads": lambda t, table: t.reshape(1, N, 2, 2).flatten(2) + t,
    "chunks": lambda t, table: torch.cat([t.chunk(2, -1)[1], t[..., :2]], -1) + t,
    "two copies": split_joint,
    "pointwise convolution": lambda t, table: (
        F.conv1d(t.transpose(1, 2), WEIGHT[..., None]).transpose(1, 2)
    ),
    "joint": lambda t, table: joint(t),
    "first": lambda t, table: t + t[:, :1],
    "cumsum": lambda t, table: t + t.cumsum(1),
    "flip": lambda t, table: t + t.flip(1),
    "convolution": lambda t, table: t + (
        F.conv1d(t.transpose(1, 2), KERNEL, padding=1, groups=CHANNELS).transpose(1, 2)
    ),
    "causal": lambda t, table: t + attend(t, is_causal=True),
    "frames": lambda t, table: mix_frames(t),
    "rolled frames": lambda t, table: t + roll_frames(t),
    "sorted": lambda t, table: t + t.sort(1).values,
    "lookup": lambda t, table: t + t[:, torch.arange(N).flip(0)],
    "swapped": lambda t, table: t + t.reshape(1, *GRID, CHANNELS).transpose(2, 3).reshape(
        1, N, CHANNELS
    ),
    "write": lambda t, table: (t * 1).index_fill_(1, torch.tensor([0]), 0.0),
}  # fmt: skip
ALIKE = list(LAYERS)[: list(LAYERS).index("joint")]


def stack(names):
    def model(x, table):
        tokens = patchify(x)
        for name in names:
            tokens = LAYERS[name](tokens, table)
        return unpatchify(attend(tokens)), tokens.amax((1, 2))

    return model


def check_stack(names):
    """Whether a stack of layers has a region; if so, it must run in any order."""
    gm = trace(stack(names), latents(), TABLE)
    region = find_region(gm)
    if not isinstance(region, OrderRegion):
        return False
    plain, moved, _ = run_ordered(gm, region, latents(), TABLE)
    for a, b in zip(moved, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return True


@pytest.mark.parametrize("name", ALIKE)
def test_layers_that_are_alike_at_every_token_are_proved(name):
    assert check_stack([name])


@settings(max_examples=80)
@given(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=5))
def test_what_is_proved_runs_in_any_order(names):
    check_stack(names)


def run_pass(make, **options):
    _, gm = capture_tiny(make)
    record, lowering = run_passes(gm, [TokenOrder(), SparseAttention()], **options)
    return record.passes[0], lowering


@pytest.mark.parametrize("make", [small.wan, small.hunyuan_video])
def test_tokens_of_every_site_are_ordered_once(make):
    record, lowering = run_pass(make, router="subblock")
    (decision,) = record.decisions
    assert decision.reason is RewriteReason.REWRITTEN and record.changed == 1
    variant = lowering.make_variant(Mode.SEARCH)
    moved = count_gathers(variant.graph.gm)
    assert f"by {moved} gathers" in record.summary
    # the order of the whole graph, and none at the sites
    assert count_calls(variant.graph.gm, torch.ops.ditopt.cube_order_v1.default) == 1
    assert count_gathers(lowering.make_variant(Mode.DENSE).graph.gm) == 0
    whole = [pin for pin in lowering.program.plan.pins if pin.place is None]
    assert [pin.sizes for pin in whole] == [(3, 4, 5, 60)]
    order, inverse = whole[0].make([3, 4, 5, 60], torch.device("cpu"))
    assert torch.equal(order[inverse], torch.arange(60))


def test_a_refusal_names_the_node_and_sites_gather_their_tokens():
    record, lowering = run_pass(small.flux, router="subblock")
    (decision,) = record.decisions
    assert decision.reason is RewriteReason.NOT_PROVED and decision.detail
    assert record.changed == 0 and decision.detail in record.summary
    assert "at each attention call" in record.summary
    assert not [pin for pin in lowering.program.plan.pins if pin.place is None]


@pytest.mark.parametrize(
    "options", [{"router": "headwise"}, {"router": "dense"}, {"router": "subblock", "density": 1}]
)
def test_an_order_that_nobody_uses_is_not_asked_for(options):
    assert not TokenOrder().wanted(Options(**options))
    assert TokenOrder().wanted(Options(router="subblock"))


def test_without_a_site_that_is_replaced_there_is_nothing_to_order():
    _, gm = capture_tiny(small.wan)
    assert TokenOrder().find(Program(gm).facts, Options(min_tokens=10_000)) == []
