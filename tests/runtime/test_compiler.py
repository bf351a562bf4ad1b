"""What the compiler hands to Inductor, and what it keeps of a graph's signature."""

from __future__ import annotations

import pytest
import torch

from dit_opt.program.modes import Mode
from dit_opt.program.program import Piece, SlotGraph
from dit_opt.program.slots import Slot, SlotRef
from dit_opt.runtime import compiler
from dit_opt.runtime.compiler import VariantCompiler
from tests.graphs import capture_one

STATE = SlotRef(Slot("test.state"))


def make(dynamic=None):
    gm = capture_one(lambda x, y: (x + 1, y * 2), torch.ones(6, 4), torch.ones(3), dynamic=dynamic)
    return SlotGraph(gm)


@pytest.fixture
def handed(monkeypatch):
    """The inputs and patches that Inductor was given."""
    given = []

    def stand_in(gm, inputs, patches):
        given.append((inputs, patches))
        return gm

    monkeypatch.setattr(compiler, "compile_with_inductor", stand_in)
    return given


def test_state_comes_behind_the_graphs_own_arguments(handed):
    graph = make()
    x = graph.gm.graph.find_nodes(op="placeholder")[0].meta["example_value"]
    state = graph.read(STATE, x.new_empty(5))
    flag = graph.read_mode(Mode.SEARCH, x)
    graph.write(STATE, state)
    inputs = [torch.ones(6, 4), torch.ones(3)]
    compiled = VariantCompiler(inputs, {"max_autotune": True}).compile(graph)
    ((given, patches),) = handed
    assert given[:2] == inputs and patches == {"max_autotune": True}
    assert [tuple(x.shape) for x in given[2:]] == [(5,), ()]
    assert compiled.outputs == 2 and [write.ref for write in compiled.writes] == [STATE]
    (read, read_shape), (mode, _) = compiled.inputs
    assert read.ref is STATE and read_shape(tuple(inputs)) == [5]
    assert mode.node is flag and mode.mode is Mode.SEARCH


def test_shapes_of_state_follow_the_arguments(handed):
    graph = make(dynamic=True)
    nodes = graph.gm.graph.find_nodes(op="placeholder")
    values = [node.meta["example_value"] for node in nodes]
    x = next(v for v in values if isinstance(v, torch.Tensor) and v.dim() == 2)
    graph.read(STATE, x.new_empty((x.shape[0] + 1) // 2, x.shape[1]))
    compiled = VariantCompiler(values, {}).compile(graph)
    ((_, read_shape),) = compiled.inputs
    for rows, columns in ((6, 4), (11, 2)):
        sizes = {str(x.shape[0]): rows, str(x.shape[1]): columns}
        args = [
            sizes.get(str(v), 3) if isinstance(v, torch.SymInt) else torch.ones(rows, columns)
            for v in values
        ]
        assert read_shape(tuple(args)) == [(rows + 1) // 2, columns]


def test_a_piece_takes_the_arguments_that_it_names(handed):
    graph = make()
    inputs = [torch.ones(6, 4), torch.ones(3), torch.ones(9)]
    piece = VariantCompiler(inputs, {}).compile_piece(Piece("piece", graph, (2, 1)))
    assert piece.arguments == (2, 1) and handed[0][0] == [inputs[2], inputs[1]]
