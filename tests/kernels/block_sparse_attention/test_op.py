"""The registered op: schema, fake and real kernels agree, in eager and in compiled graphs."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.block_sparse_attention import block_sparse_attention

from .plans import Case, assert_matches_reference, make_inputs

CASES = {
    "odd sizes": Case(batch=2, queries=77, keys=131),
    "strided": Case(batch=2, queries=77, keys=131, strided=True),
    "grouped heads": Case(heads=4, queries=77, keys=64),
    "bias": Case(batch=2, plan_batch=2, queries=64, keys=131, bias=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_opcheck(case, dtype):
    operator = torch.ops.ditopt.block_sparse_attention_v1.default
    results = torch.library.opcheck(operator, make_inputs(case, dtype))
    assert set(results.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in results


def test_scale_and_blocks_have_defaults():
    q, k, v, counts, indices, _, _, _, _ = make_inputs(Case(block_q=128, block_k=128, dim=64))
    arguments = (q, k, v, counts, indices, None, 64**-0.5, 128, 128)
    assert_matches_reference(block_sparse_attention(*arguments[:5]), arguments, 2e-6, 2e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_holds_one_op_and_gives_the_same(dynamic):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True, dynamic=dynamic)
    def attend(*arguments):
        out, _ = torch.ops.ditopt.block_sparse_attention_v1(*arguments, None, 0.2, 64, 64)
        return out.transpose(1, 2).flatten(2)

    arguments = make_inputs(Case(queries=150, keys=150, strided=True))[:5]
    compiled = attend(*arguments)
    out, _ = torch.ops.ditopt.block_sparse_attention_v1(*arguments, None, 0.2, 64, 64)
    torch.testing.assert_close(compiled, out.transpose(1, 2).flatten(2), atol=0, rtol=0)
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("block_sparse_attention_v1" in name for name in names) == 1


def test_a_gpu_kernel_is_registered():
    name = "ditopt::block_sparse_attention_v1"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
