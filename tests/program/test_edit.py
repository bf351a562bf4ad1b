from __future__ import annotations

import copy

import torch
from torch import nn

from dit_opt._compat import compile_with_inductor, size_expression
from dit_opt.program.edit import (
    append_outputs,
    append_placeholder,
    copy_graph,
    copy_with_nodes,
    erase_unused,
)
from tests.graphs import capture_one
from zoo import small


def compile_through(function, edit):
    """Compile with a backend that copies the graph, edits it and hands it to Inductor."""
    seen = {}

    def backend(gm, inputs):
        copied = copy_graph(gm)
        seen["names"] = [n.name for n in gm.graph.nodes]
        seen["copied names"] = [n.name for n in copied.graph.nodes]
        extra = edit(copied)
        compiled = compile_with_inductor(copied, list(inputs) + extra, {})
        seen["code"] = gm.code

        def bound(*args):
            state = [torch.full((4,), 10.0) for _ in extra]
            out = compiled(*args, *state)
            seen["out"] = out
            return out[:1]

        return bound

    torch.compiler.reset()
    return torch.compile(function, backend=backend), seen


def test_copies_keep_what_dynamo_and_aot_read():
    tiny = small.wan(layers=1)
    graphs = []

    def backend(gm, inputs):
        copied = copy_graph(gm)
        graphs.append(copied)
        for original, node in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
            assert original is not node and original.name == node.name
            assert original.meta == node.meta and original.meta is not node.meta
            if node.op == "placeholder":
                assert node._dynamo_source is original._dynamo_source
        assert copied.meta == gm.meta and copied.meta is not gm.meta
        assert copied._param_name_to_source is gm._param_name_to_source
        assert copied.code == gm.code
        return gm.forward

    torch.compiler.reset()
    tiny(torch.compile(tiny.model, backend=backend))
    torch.compiler.reset()
    assert len(graphs) == 1


def test_editing_a_copy_leaves_the_original():
    gm = capture_one(lambda x: x + 1, torch.ones(4))
    code = gm.code
    copied = copy_graph(gm)
    append_placeholder(copied, "state", torch.ones(1))
    copied.recompile()
    assert gm.code == code and copied.code != code


def test_a_copy_has_a_node_for_each_of_the_original():
    gm = capture_one(lambda x: x + 1, torch.ones(4))
    copied, at = copy_with_nodes(gm)
    assert list(at) == list(gm.graph.nodes) and list(at.values()) == list(copied.graph.nodes)
    (output,) = copied.graph.find_nodes(op="output")
    assert output.args[0] == tuple(at[n] for n in gm.graph.find_nodes(op="output")[0].args[0])


def test_copies_share_submodules():
    gm = capture_one(lambda x: x + 1, torch.ones(4))
    gm.table = nn.Linear(2, 2)
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.get_attr("table.weight")
    assert copy_graph(gm).table.weight is gm.table.weight


def test_state_in_and_out_through_inductor():
    layer = nn.Linear(4, 4).requires_grad_(False)

    def edit(gm):
        placeholders = gm.graph.find_nodes(op="placeholder")
        example = next(
            n.meta["example_value"].new_empty(4)
            for n in placeholders
            if isinstance(n.meta["example_value"], torch.Tensor)
        )
        (output,) = gm.graph.find_nodes(op="output")
        with gm.graph.inserting_before(output):
            # the insertion point must survive
            state = append_placeholder(gm, "ditopt_state", example)
            added = gm.graph.call_function(torch.add, (state, 1))
        append_outputs(gm, [added])
        assert gm.graph.find_nodes(op="placeholder")[-1] is state
        gm.graph.lint()
        gm.recompile()
        return [example]

    x = torch.randn(3, 4)
    compiled, seen = compile_through(lambda x: layer(x) * 2, edit)
    torch.testing.assert_close(compiled(x), layer(x) * 2)
    assert seen["names"] == seen["copied names"]
    torch.testing.assert_close(seen["out"][1], torch.full((4,), 11.0))
    torch.compiler.reset()


def test_placeholders_are_marked_static():
    gm = capture_one(lambda x: x + 1, torch.ones(4))
    node = append_placeholder(gm, "state", torch.ones(1))
    assert node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}
    assert node._dynamo_source.name
    again = append_placeholder(gm, "state", torch.ones(1))
    assert again.name != node.name
    assert gm.graph.find_nodes(op="placeholder")[-2:] == [node, again]


def test_placeholders_may_have_symbolic_sizes():
    gm = capture_one(lambda x: x + 1, torch.ones(6, 4), dynamic=True)
    x = gm.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
    node = append_placeholder(gm, "state", x.new_empty((x.shape[0] + 1) // 2))
    assert size_expression(node.meta["example_value"].shape[0]).free_symbols


def test_a_graph_without_placeholders():
    gm = capture_one(lambda: torch.ones(3) + 1)
    append_placeholder(gm, "state", torch.ones(1))
    assert next(iter(gm.graph.nodes)).op == "placeholder"


def test_unused_nodes_go_and_writes_stay():
    def forward(x):
        y = x.clone()
        z = y + 1
        y.mul_(2)
        return z * 2

    gm = capture_one(forward, torch.ones(4))
    unused = copy.copy([n for n in gm.graph.nodes if n.op == "call_function"])
    (output,) = gm.graph.find_nodes(op="output")
    (y,) = gm.graph.find_nodes(op="call_method", target="clone")
    output.args = ((y,),)
    erase_unused(gm.graph, unused)
    assert [n.target for n in gm.graph.nodes if n.op.startswith("call")] == ["clone", "mul_"]
