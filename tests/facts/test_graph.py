from __future__ import annotations

import torch
import torch.nn.functional as F

from dit_opt.facts import graph as facts_graph
from dit_opt.facts.graph import Facts, InputHints, name_fact
from dit_opt.facts.masks import MaskKind, classify_mask
from dit_opt.facts.sites import find_sites
from dit_opt.facts.timestep import find_timestep
from dit_opt.facts.tokens import find_tokens
from tests.graphs import capture_one, capture_tiny
from zoo import small


def count_calls(monkeypatch, name):
    """The number of calls so far of a function that Facts uses."""
    calls, function = [], getattr(facts_graph, name)

    def counted(*args):
        calls.append(args)
        return function(*args)

    counted.__name__ = name
    monkeypatch.setattr(facts_graph, name, counted)
    return calls


def attend(x, *ids):
    for numbers in ids:
        x = x + numbers.sum(-1)[None, :, None]
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def test_facts_are_those_of_the_functions():
    _, gm = capture_tiny(small.wan)
    facts = Facts(gm)
    assert facts.sites == find_sites(gm.graph)
    assert facts.timestep == find_timestep(gm.graph)
    assert facts.tokens.layouts == find_tokens(gm.graph, facts.sites).layouts
    assert facts.token_ids == {}
    assert all(facts.mask_of(s).kind is MaskKind.NONE for s in facts.sites)


def test_nothing_is_computed_before_its_first_use_nor_twice(monkeypatch):
    sites, tokens, masks = (
        count_calls(monkeypatch, name) for name in ("find_sites", "find_tokens", "classify_mask")
    )
    _, gm = capture_tiny(small.wan)
    facts = Facts(gm)
    assert not sites and not tokens
    assert facts.sites is facts.sites
    assert len(sites) == 1 and not tokens
    assert facts.tokens is facts.tokens and facts.token_ids is facts.token_ids
    for site in facts.sites * 2:
        facts.mask_of(site)
    assert len(sites) == len(tokens) == 1 and len(masks) == len(facts.sites)


def test_an_absent_timestep_is_cached(monkeypatch):
    calls = count_calls(monkeypatch, "find_timestep")
    facts = Facts(capture_one(attend, torch.randn(2, 60, 8)))
    assert facts.timestep is facts.timestep is None
    assert len(calls) == 1


def test_an_edit_drops_all_facts_but_those_that_are_named():
    gm = capture_one(lambda x: attend(attend(x)), torch.randn(2, 60, 8))
    facts = Facts(gm)
    sites, tokens = facts.sites, facts.tokens
    first, second = sites
    second.node.replace_all_uses_with(second.node.args[0])
    gm.graph.erase_node(second.node)
    facts.drop(keep=frozenset({"tokens"}))
    assert facts.tokens is tokens
    assert [s.node for s in facts.sites] == [first.node]
    facts.drop()
    assert list(facts.tokens.layouts) == [first.node]


def test_a_new_fact_needs_no_edit_here():
    def count_nodes(graph):
        return len(graph.nodes)

    def find_masked_sites(facts):
        return [s for s in facts.sites if s.mask is not None]

    def attend_masked(q, mask):
        return F.scaled_dot_product_attention(q, q, q, mask)

    facts = Facts(capture_one(attend_masked, torch.randn(2, 1, 6, 8), torch.randn(6, 6)))
    assert facts.get(count_nodes) == len(facts.graph.nodes)
    found = facts.get(find_masked_sites, facts)
    assert found is facts.get(find_masked_sites, facts) and found == list(facts.sites)
    facts.drop(keep=frozenset({"masked_sites"}))
    assert facts.get(find_masked_sites, facts) is found


def test_facts_are_named_after_their_functions():
    assert name_fact(find_timestep) == "timestep" and name_fact(classify_mask) == "mask"
    _, gm = capture_tiny(small.flux)
    facts = Facts(gm)
    made = {
        "sites": lambda: facts.sites,
        "tokens": lambda: facts.tokens,
        "token_ids": lambda: facts.token_ids,
        "timestep": lambda: facts.timestep,
        "mask": lambda: facts.mask_of(facts.sites[0]),
    }
    for name, read in made.items():
        facts.drop()
        value = read()
        facts.drop(keep=frozenset({name}))
        assert read() is value, name


def test_token_ids_give_the_grid_where_all_of_a_site_agree():
    text = torch.randn(2, 7, 8)
    ids = torch.randn(60, 3), torch.randn(60, 3)

    def model(x, text, a, b):
        return attend(x, a, b) + attend(text).mean()

    gm = capture_one(model, torch.randn(2, 60, 8), text, *ids)
    names = {n.name: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    a, b = names["l_a_"], names["l_b_"]

    def grid_of(read):
        facts = Facts(gm, InputHints(read_grid=lambda ids: read.get(ids.argument)))
        assert {ids.argument for ids in facts.token_ids[facts.sites[0].node]} >= {a, b}
        return facts.tokens.layouts[facts.sites[0].node].grid

    assert grid_of({}) is None
    assert grid_of({a: (3, 4, 5)}).sizes == (3, 4, 5)
    assert grid_of({a: (3, 4, 5), b: (3, 4, 5)}).source == "positions"
    assert grid_of({a: (3, 4, 5), b: (3, 5, 4)}) is None
    assert Facts(gm).tokens.layouts[Facts(gm).sites[0].node].grid is None


def test_spans_of_inputs_give_the_grid():
    gm = capture_one(attend, torch.randn(2, 60, 8))
    hints = InputHints({0: ((1, ((60, (3, 4, 5)),)),)})
    facts = Facts(gm, hints)
    assert facts.tokens.layouts[facts.sites[0].node].grid.sizes == (3, 4, 5)
