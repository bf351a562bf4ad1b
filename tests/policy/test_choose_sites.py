"""Each reason, on a site that differs in nothing else from one that is replaced."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

from dit_opt.decisions import AttentionReason
from dit_opt.facts.graph import Facts, InputHints, _read_tokens
from dit_opt.facts.layouts import SiteKind
from dit_opt.facts.sites import find_sites
from dit_opt.options import OptionError, Options
from dit_opt.policy.choose_sites import find_choices, find_sparse_sites, mark_ordered
from dit_opt.policy.site_cost import predict_attention, predict_site
from dit_opt.program.edit import copy_graph
from dit_opt.routers import ROUTERS
from dit_opt.routers.base import Goal
from tests.graphs import capture_one, capture_tiny
from zoo.small import cogvideox, flux, hunyuan_video, sd3, wan


def choose(gm, sites=None, tokens=None, hints=None, **options):
    """The choices for a graph, or for other facts of it."""
    facts = Facts(gm, hints)
    if sites is not None:
        facts.put(tuple(sites), find_sites)
    if tokens is not None:
        facts.put(tokens, _read_tokens, facts)
    return find_choices(facts, Options(**{"min_tokens": 0, **options}))


def choose_for(make, **options):
    return choose(capture_tiny(make)[1], **options)


def reasons(options, make=wan, **facts):
    return [c.decision.reason for c in choose(capture_tiny(make)[1], **facts, **options)]


def test_self_attention_is_replaced_and_cross_attention_is_not():
    assert (
        reasons({"min_tokens": 0})
        == [AttentionReason.REPLACED, AttentionReason.CROSS_ATTENTION] * 2
    )


def test_a_replaced_site_carries_grid_start_and_target():
    options = Options(min_tokens=0, quality=0.9)
    choice = choose_for(cogvideox, quality=0.9)[0]
    assert choice.sparse is not None
    assert (choice.sparse.grid, choice.sparse.start) == ((3, 4, 5), 7)
    assert choice.sparse.goal == Goal(0.9, by_density=False)
    assert choice.decision.layout.grid_source == "latents"
    heads, n, d = 2 * 2, 67, 16
    assert choice.decision.flops_dense == 4 * heads * n * n * d
    prediction = predict_site(choice.sparse.site, options)
    assert choice.decision.gain == prediction.gain(n)
    assert choice.decision.pays_from == prediction.crossover


def test_a_density_is_handed_on_as_one():
    choice = choose_for(wan, density=0.3)[0]
    assert choice.sparse.goal == Goal(0.3, by_density=True)


def test_keeping_everything_needs_no_grid():
    assert reasons({"density": 1, "min_tokens": 0}, flux) == [AttentionReason.REPLACED] * 2
    assert reasons({"min_tokens": 0}, flux) == [AttentionReason.REPLACED] * 2
    with pytest.raises(OptionError, match="NO_GRID"):
        reasons({"router": "rainfusion", "min_tokens": 0}, flux)


def test_a_given_grid_serves_packed_tokens():
    choices = choose_for(flux, grid=(1, 4, 5))
    assert [c.decision.layout.grid_source for c in choices] == ["option"] * 2
    assert choices[0].sparse.grid == (1, 4, 5)
    assert choices[0].sparse.start == 7


def test_short_sites_stay_dense():
    assert AttentionReason.TOO_SHORT in reasons({"min_tokens": 61})
    assert AttentionReason.TOO_SHORT not in reasons({"min_tokens": 60})
    assert AttentionReason.TOO_SHORT in reasons({"min_tokens": None})


def test_sites_that_no_length_makes_worth_it_stay_dense():
    assert AttentionReason.NEVER_PAYS in reasons({"density": 0.95, "min_tokens": None})
    assert AttentionReason.NEVER_PAYS not in reasons({"density": 0.95, "min_tokens": 0})
    # asked for to see that nothing changes
    assert reasons({"density": 1, "min_tokens": None})[0] is AttentionReason.REPLACED


def test_a_length_that_varies_is_judged_in_each_call():
    tiny = wan()
    gm = capture_one(tiny.model, dynamic=True, **tiny.inputs)
    choice = choose(gm, min_tokens=None)[0]
    assert choice.decision.replaced
    assert choice.sparse.min_tokens == max(choice.decision.pays_from, 1024)
    assert choice.decision.gain < 1


def test_the_dense_router_replaces_nothing():
    assert set(reasons({"router": "dense", "min_tokens": 0})) == {AttentionReason.ROUTER_DENSE}


def test_a_refusal_of_the_call_itself_comes_first():
    sites = Facts(capture_tiny(wan)[1]).sites
    refused = [dataclasses.replace(s, refusal=AttentionReason.CAUSAL) for s in sites]
    assert set(reasons({"min_tokens": 0}, sites=refused)) == {AttentionReason.CAUSAL}


def test_unknown_tokens_stay_dense():
    tokens = Facts(capture_tiny(wan)[1]).tokens
    layouts = {
        n: dataclasses.replace(layout, kind=SiteKind.UNKNOWN)
        for n, layout in tokens.layouts.items()
    }
    unknown = dataclasses.replace(tokens, layouts=layouts)
    assert reasons({"min_tokens": 0}, tokens=unknown)[0] is AttentionReason.UNKNOWN_TOKENS


def test_masks_that_are_more_than_key_padding_stay_dense():
    def model(x, mask):
        q = x[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0]

    found, _ = reasons_of(model, torch.randn(2, 60, 16), torch.randn(60, 60))
    assert found == [AttentionReason.MASK_NOT_KEY_PADDING]


def test_a_mask_over_text_matters_where_text_would_be_replaced():
    replaced = [AttentionReason.REPLACED] * 2
    assert reasons({"min_tokens": 0}, hunyuan_video) == [AttentionReason.TEXT_ONLY, *replaced]
    every = reasons({"min_tokens": 0, "density": 1}, hunyuan_video)
    assert every == [AttentionReason.MASK_NOT_KEY_PADDING, *replaced]


def test_latents_that_attend_to_text_which_does_not_query_stay_dense():
    def model(x, text):
        q, k = x[:, None], torch.cat([text, x], 1)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)[:, 0]

    inputs = torch.randn(2, 60, 16), torch.randn(2, 8, 16)
    found, (choice,) = reasons_of(model, *inputs, density=0.25)
    assert found == [AttentionReason.UNEQUAL_LENGTHS] and choice.decision.detail == "60 and 68"


def test_a_key_padding_mask_is_handed_on():
    sparse = [c.sparse for c in choose_for(hunyuan_video) if c.sparse]
    assert sparse and all(s.key_mask is not None and not s.mask_queries for s in sparse)


def attend(x):
    """[B, N, 16] -> [B, N, 16] by one head."""
    return torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[
        :, 0
    ]


def reasons_of(function, *args, **options):
    choices = choose(capture_one(function, *args), **options)
    return [c.decision.reason for c in choices], choices


def block(x, text):
    """Both streams are returned, as by a lone block."""
    y = attend(torch.cat([x, text], 1))
    return y[:, : x.shape[1]], y[:, x.shape[1] :]


@pytest.mark.parametrize("router", ["auto", "headwise", "rainfusion"])
@pytest.mark.parametrize("target", [{"density": 0.25}, {"quality": 0.9}])
def test_streams_of_which_none_is_known_to_be_latents_stay_dense(router, target):
    inputs = torch.randn(2, 60, 16), torch.randn(2, 8, 16)
    if router != "auto":
        with pytest.raises(OptionError, match=r"UNKNOWN_TOKENS.*Several segments"):
            reasons_of(block, *inputs, router=router, **target)
        return
    found, (choice,) = reasons_of(block, *inputs, **target)
    assert found == [AttentionReason.UNKNOWN_TOKENS]
    assert "Several segments reach the output" in choice.decision.detail
    assert "grid" in choice.decision.detail


def test_a_given_grid_or_keeping_everything_serves_a_lone_block():
    inputs = torch.randn(2, 60, 16), torch.randn(2, 8, 16)
    assert reasons_of(block, *inputs, density=1)[0] == [AttentionReason.REPLACED]
    found, (choice,) = reasons_of(block, *inputs, density=0.25, grid=(3, 4, 5))
    assert found == [AttentionReason.REPLACED]
    assert (choice.sparse.start, choice.sparse.video) == (0, 60)


def test_tokens_whose_way_to_the_output_is_lost_stay_dense():
    """As those of Z-Image: the latents are one more input, beside the text."""

    def model(x, text):
        image, words = attend(x), attend(text)
        return attend(torch.cat([image, words], 1).roll(1, 1)).roll(-1, 1)

    inputs = torch.randn(2, 60, 16), torch.randn(2, 8, 16)
    assert reasons_of(model, *inputs, density=0.25)[0] == [AttentionReason.UNKNOWN_TOKENS] * 3
    found, choices = reasons_of(model, *inputs, density=0.25, grid=(3, 4, 5))
    assert found == [
        AttentionReason.REPLACED,
        AttentionReason.TEXT_ONLY,
        AttentionReason.UNKNOWN_TOKENS,
    ]
    assert "68 tokens" in choices[2].decision.detail


def test_text_by_itself_stays_dense():
    def model(x, text):
        text = attend(text)
        return attend(torch.cat([text, x], 1))[:, 8:]

    inputs = torch.randn(2, 60, 16), torch.randn(2, 8, 16)
    found, _ = reasons_of(model, *inputs, density=0.25)
    assert found == [AttentionReason.TEXT_ONLY, AttentionReason.REPLACED]


def test_text_with_padding_of_its_own_is_text():
    def model(x, text):
        text = attend(torch.cat([text, text.new_zeros(2, 3, 16)], 1))
        return attend(torch.cat([text, x], 1))[:, 11:]

    inputs = torch.randn(2, 60, 16), torch.randn(2, 8, 16)
    found, _ = reasons_of(model, *inputs, density=0.25)
    assert found == [AttentionReason.TEXT_ONLY, AttentionReason.REPLACED]


def test_an_assumed_grid_says_so():
    def model(x):
        return attend(x + (torch.arange(3.0)[:, None] * torch.arange(20.0)).flatten()[:, None])

    found, (choice,) = reasons_of(model, torch.randn(2, 60, 16), density=0.25)
    assert found == [AttentionReason.REPLACED]
    assert choice.decision.layout.grid_source == "tables, one frame assumed"
    _, (given,) = reasons_of(model, torch.randn(2, 60, 16), density=0.25, grid=(3, 4, 5))
    assert given.sparse.grid == (3, 4, 5)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": torch.float64}, AttentionReason.UNSUPPORTED_DTYPE),
        ({"dim": 8}, AttentionReason.UNSUPPORTED_HEAD_DIM),
        ({"dim": 264}, AttentionReason.UNSUPPORTED_HEAD_DIM),
    ],
)
def test_tensors_that_the_kernel_does_not_take(changes, reason):
    gm = capture_tiny(wan)[1]
    sites = Facts(gm).sites
    site = sites[0]
    nodes = {}
    for name in ("query", "key", "value"):
        node = gm.graph.__class__().placeholder(name)
        shape = (2, 2, 60, changes.get("dim", 24))
        dtype = changes.get("dtype", torch.float32)
        node.meta["example_value"] = torch.empty(shape, dtype=dtype, device="meta")
        nodes[name] = node
    changed = dataclasses.replace(site, **nodes)
    assert reasons({"min_tokens": 0}, sites=[changed, sites[2]])[0] is reason


def test_a_grid_that_fits_no_site_is_an_error():
    with pytest.raises(OptionError, match=r"72 tokens.*60"):
        reasons({"grid": (3, 4, 6), "min_tokens": 0})


def test_a_grid_at_odds_with_the_graph_is_an_error():
    with pytest.raises(OptionError, match=r"proves \(3, 4, 5\)"):
        reasons({"grid": (5, 4, 3), "min_tokens": 0})


def test_a_grid_that_agrees_is_taken_from_the_graph():
    choice = choose_for(wan, grid=(3, 4, 5))[0]
    assert choice.decision.layout.grid_source == "latents"


def capture_symbolic(make):
    tiny = make(batch=2)
    return capture_one(tiny.model, dynamic=True, **tiny.inputs)


def test_a_proved_grid_of_symbols_stays_where_one_is_given():
    gm = capture_symbolic(wan)
    proved, given = (choose(gm, grid=grid)[0] for grid in (None, (3, 4, 5)))
    assert given.sparse.grid == proved.sparse.grid
    assert not all(size.is_Integer for size in given.sparse.grid)
    assert given.decision.layout.grid_source == "latents"


def test_a_given_grid_is_checked_where_the_proved_one_is_a_number():
    gm = capture_symbolic(sd3)
    with pytest.raises(OptionError, match=r"grid=\(4, 1, 5\) contradicts .* proves \(1, .*s"):
        choose(gm, grid=(4, 1, 5))
    assert choose(gm, grid=(1, 4, 5))[0].sparse


def test_a_grid_fits_no_length_that_changes():
    gm = capture_symbolic(flux)
    with pytest.raises(OptionError, match=r"differ from call to call.*dynamic=False"):
        choose(gm, grid=(1, 4, 5))


def test_a_router_asked_for_by_name_must_serve_a_site():
    with pytest.raises(OptionError, match="can serve none"):
        reasons({"router": "rainfusion", "min_tokens": 100})
    assert AttentionReason.REPLACED in reasons({"router": "rainfusion", "min_tokens": 0})


def test_symbolic_lengths_are_judged_in_each_call():
    from dit_opt.policy.choose_sites import _fewer

    assert _fewer(sympy.Integer(5), 6) and not _fewer(sympy.Symbol("s0"), 6)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_a_router_is_handed_on_with_what_it_aims_at(router):
    choice = choose_for(wan, router=router.name)[0]
    assert choice.sparse.router is router and choice.decision.router == router.name
    density = router.density
    assert choice.sparse.goal == Goal(density or 0.9, by_density=density is not None)


def test_the_grid_of_the_whole_model_serves_a_block():
    def block_of_video(x):
        return attend(x)

    x = torch.randn(2, 60, 16)
    (choice,) = choose(capture_one(block_of_video, x), hints=InputHints(grid=(3, 4, 5)))
    assert choice.sparse.grid == (3, 4, 5)
    assert choice.decision.layout.grid_source == "model"


def test_sites_are_those_that_the_graph_has_now():
    """A pass may have put another query or key in front of a call."""
    facts = Facts(copy_graph(capture_tiny(wan)[1]))
    options = Options(min_tokens=0)
    before = find_sparse_sites(facts, options)
    graph, site = facts.graph, before[0].site
    with graph.inserting_before(site.node):
        query = graph.call_function(torch.neg, (site.query,))
    query.meta = {**site.query.meta}
    site.node.replace_input_with(site.query, query)
    facts.drop(frozenset({"choices", "tokens"}))
    after = find_sparse_sites(facts, options)
    assert [sparse.site.query for sparse in after] == [query, before[1].site.query]
    assert [sparse.grid for sparse in after] == [(3, 4, 5)] * 2


def test_ordered_sites_are_marked_and_read_their_masks_in_the_order():
    choices = choose_for(hunyuan_video)
    first, last = (c for c in choices if c.sparse)
    moved = {first.sparse.key_mask: first.node}
    marked = {c.node: c.sparse for c in mark_ordered(choices, [first.node], moved)}
    assert marked[first.node].ordered and not marked[last.node].ordered
    assert marked[first.node].key_mask is first.node
    assert [c.node for c in choices if marked[c.node] is None] == [choices[0].node]


def test_every_router_has_a_cost():
    times = {}
    for router in ROUTERS:
        options = Options(router=router.name, density=0.2, refresh_every=1)
        found = predict_attention(8, 64, 4, torch.device("cpu"), options)
        _, times[router.name] = found.spend(8192)
    # one searches nothing, the other everything
    assert min(times, key=times.__getitem__) == "frame_tile"
    assert max(times, key=times.__getitem__) == "oracle"
