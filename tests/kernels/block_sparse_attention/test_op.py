"""The registered op: schema, fake and real kernels agree, in eager and in compiled graphs."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.block_sparse_attention import block_sparse_attention

from .plans import Case, assert_matches_reference, flatten_tail, make_inputs

CASES = {
    "odd sizes": Case(batch=2, queries=77, keys=131),
    "strided": Case(batch=2, queries=77, keys=131, strided=True),
    "grouped heads": Case(heads=4, queries=77, keys=64),
    "bias": Case(batch=2, plan_batch=2, queries=64, keys=131, bias=True),
    "tail": Case(batch=2, heads=4, queries=77, keys=131, tail=True),
    "tail, bias": Case(heads=4, queries=77, keys=131, bias=True, bias_heads=4, tail=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_opcheck(case, dtype):
    operator = torch.ops.ditopt.block_sparse_attention_v3.default
    results = torch.library.opcheck(operator, flatten_tail(make_inputs(case, dtype)))
    assert set(results.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("peak", [1.0, 20.0])
def test_what_nobody_wants_is_not_computed(case, dtype, peak):
    operator = torch.ops.ditopt.block_sparse_attention_v3.default
    q, *others = flatten_tail(make_inputs(case, dtype))
    arguments = (q * peak, *others)
    out, lse = operator(*arguments, with_lse=False)
    assert lse.shape == (*q.shape[:2], 0)
    torch.testing.assert_close(out, operator(*arguments)[0], rtol=0, atol=0, equal_nan=True)
    torch.library.opcheck(operator, arguments, {"with_lse": False})


def test_scale_and_blocks_have_defaults():
    q, k, v, counts, indices, _, _, _, _ = make_inputs(Case(block_q=128, block_k=128, dim=64))
    arguments = (q, k, v, counts, indices, None, 64**-0.5, 128, 128)
    assert_matches_reference(block_sparse_attention(*arguments[:5]), arguments, 2e-6, 2e-6)


def test_the_tail_is_named():
    arguments = make_inputs(Case(queries=77, keys=131, bias=True, tail=True))
    results = block_sparse_attention(*arguments[:9], tail="centroid")
    assert_matches_reference(results, arguments, 2e-6, 2e-6)
    with pytest.raises(ValueError, match="'drop' or 'centroid', not 'mean'"):
        block_sparse_attention(*arguments[:9], tail="mean")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_holds_one_op_and_gives_the_same(dynamic):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True, dynamic=dynamic)
    def attend(*arguments):
        out, _ = torch.ops.ditopt.block_sparse_attention_v3(*arguments, None, 0.2, 64, 64)
        return out.transpose(1, 2).flatten(2)

    arguments = make_inputs(Case(queries=150, keys=150, strided=True))[:5]
    compiled = attend(*arguments)
    out, _ = torch.ops.ditopt.block_sparse_attention_v3(*arguments, None, 0.2, 64, 64)
    torch.testing.assert_close(compiled, out.transpose(1, 2).flatten(2), atol=0, rtol=0)
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("block_sparse_attention_v3" in name for name in names) == 1


def test_a_gpu_kernel_is_registered():
    name = "ditopt::block_sparse_attention_v3"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
