"""Slots in the signature of a graph, modes, and what dense steps run."""

from __future__ import annotations

import pytest
import torch

from dit_opt.facts.graph import Facts, InputHints
from dit_opt.program.modes import Mode, Schedule
from dit_opt.program.program import ModePlan, Program, SlotGraph
from dit_opt.program.signature import find_user_inputs, read_signature
from dit_opt.program.slots import Slot, SlotRef
from dit_opt.program.spec import check_graph, list_unvalued
from tests.graphs import capture_one, capture_tiny
from zoo.small import cogvideox, wan

WORDS = SlotRef(Slot("toy.words"))


def make():
    return capture_one(lambda x: (x + 1, x * 2), torch.ones(4))


def placeholders(graph):
    return graph.gm.graph.find_nodes(op="placeholder")


def outputs(graph):
    return graph.gm.graph.find_nodes(op="output")[0].args[0]


def find_example(graph):
    return placeholders(graph)[0].meta["example_value"]


def test_state_is_appended_to_the_signature():
    graph = SlotGraph(make())
    own, example = placeholders(graph), find_example(graph)
    words = graph.read(WORDS, example.new_empty(3, dtype=torch.int32))
    again = graph.read(SlotRef(WORDS.slot, place=1), example.new_empty(3))
    flag = graph.read_mode(Mode.SEARCH, example)
    assert placeholders(graph) == [*own, words, again, flag]
    assert [given.node for given in graph.inputs] == [words, again, flag]
    assert graph.inputs[0].example.dtype == torch.int32 and "toy_words_0" in words.name
    before = outputs(graph)
    graph.write(WORDS, words)
    graph.write(WORDS, again, [Mode.SEARCH])
    assert outputs(graph) == (*before, words, again)
    assert graph.outputs == len(before) == 2
    assert [write.modes for write in graph.writes] == [frozenset(), frozenset({Mode.SEARCH})]
    check_graph(graph, "test")


def test_a_slot_is_read_once_at_a_place():
    graph = SlotGraph(make())
    example = find_example(graph)
    refs = [WORDS, SlotRef(Slot("toy.words")), SlotRef(WORDS.slot, 1), SlotRef(WORDS.slot, 0, 1)]
    nodes = [graph.read(ref, example) for ref in refs]
    assert nodes[0] is nodes[1] and len(set(nodes)) == 3
    flags = [graph.read_mode(mode, example) for mode in (Mode.SEARCH, Mode.SEARCH, Mode.VERIFY)]
    assert flags[0] is flags[1] is not flags[2]


def test_a_copy_has_the_state_on_its_own_nodes():
    graph = SlotGraph(make())
    words = graph.read(WORDS, find_example(graph))
    graph.write(WORDS, words, [Mode.REUSE])
    copied, at = graph.copy()
    assert copied.outputs == graph.outputs == 2
    assert [given.node for given in copied.inputs] == [at[words]]
    assert [write.node for write in copied.writes] == [at[words]]
    assert copied.writes[0].modes == {Mode.REUSE} and copied.inputs[0].ref is WORDS
    copied.read(SlotRef(Slot("more")), find_example(copied))
    assert len(graph.inputs) == 1 and words in graph.gm.graph.nodes
    check_graph(copied, "test")
    check_graph(graph, "test")


def test_a_program_is_a_copy_of_its_graph():
    gm = make()
    program = Program(gm)
    program.main.read(WORDS, find_example(program.main))
    assert len(gm.graph.find_nodes(op="placeholder")) == 1
    assert program.facts.gm is program.main.gm


def test_dense_steps_run_the_graph_as_it_was_kept():
    program = Program(make())
    assert program.dense is program.main
    program.main.read(WORDS, find_example(program.main))
    program.keep_dense()
    dense = program.dense
    kept = list(program.main.gm.graph.nodes)
    program.main.read(SlotRef(Slot("sparse")), find_example(program.main))
    # once is for all
    program.keep_dense()
    assert program.dense is dense and len(dense.inputs) == 1
    variants = {mode: program.start_variant(mode) for mode in Mode}
    assert {mode for mode, v in variants.items() if len(v.graph.inputs) == 2} == set(Mode) - {
        Mode.DENSE
    }
    for mode, variant in variants.items():
        assert variant.mode is mode and variant.plan is program.plan
        # a pass knows the nodes of the main graph alone
        nodes = kept if mode is Mode.DENSE else list(program.main.gm.graph.nodes)
        assert list(variant.at) == nodes
        assert set(variant.at.values()) == set(variant.graph.gm.graph.nodes)


@pytest.mark.parametrize(
    ("modes", "dense_steps", "first"),
    [
        ({Mode.DENSE}, 0, Mode.DENSE),
        ({Mode.DENSE, Mode.SEARCH}, 0, Mode.SEARCH),
        ({Mode.DENSE, Mode.SEARCH}, 1, Mode.DENSE),
        ({Mode.DENSE, Mode.SEARCH}, 0.2, Mode.DENSE),
    ],
)
def test_the_mode_of_a_first_call_follows_from_the_schedule(modes, dense_steps, first):
    assert ModePlan(frozenset(modes), Schedule(dense_steps)).first_mode is first


def test_what_dynamo_gives_no_value_is_known():
    graph = SlotGraph(make())
    node = next(n for n in graph.gm.graph.nodes if n.op == "call_function")
    assert list_unvalued(graph) == set()
    del node.meta["example_value"]
    assert list_unvalued(graph) == {node.name}
    check_graph(graph, "test", list_unvalued(graph))


def test_a_signature_tells_what_arguments_and_outputs_mean():
    tiny, gm = capture_tiny(wan)
    signature = read_signature(Facts(gm))
    nodes = gm.graph.find_nodes(op="placeholder")
    assert signature.outputs == 1
    assert [nodes[i].name for i in signature.timesteps] == ["l_kwargs_timestep_"]
    assert "parameters" in nodes[signature.model].name
    given = {nodes[i].name for i in signature.user_inputs}
    assert given == {f"l_kwargs_{name}_" for name in tiny.inputs if name != "return_dict"}
    assert signature.user_inputs == find_user_inputs(gm.graph)
    # the model returns a video, not tokens
    assert signature.spans == {}


def test_what_is_known_of_inputs_reaches_the_facts():
    _, gm = capture_tiny(cogvideox)
    hints = InputHints(grid=(3, 4, 5))
    assert Program(gm, hints).facts.hints is hints
    assert Program(gm).facts.hints.grid is None
