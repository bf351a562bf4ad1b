"""Replace attention sites by block-sparse attention.

The pass that the project is about; everything it needs to know was decided before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt.kernels.routers.rainfusion import candidate_names
from dit_opt.passes.graph_edit import append_outputs
from dit_opt.passes.plan_nodes import BLOCK_K, BLOCK_Q, SparseSite, unpack, write_plan
from dit_opt.passes.symbolic_sizes import SizeWriter


def sparse_attention(
    gm: GraphModule, sites: Sequence[SparseSite], reuse_plans: bool = False
) -> int:
    """Rewrite the sites in `gm`; returns how many there were.

    Triggers on the sites it is given, each one `scaled_dot_product_attention` call::

        %out = scaled_dot_product_attention(%q, %k, %v)

    becomes, with `reuse_plans=False`, under the router `rainfusion`::

        %choice, %recall, %density = rainfusion_recognize_v1(%q, %k, ..., T, H, W, start)
        %counts, %indices, %rows, %inverse = rainfusion_plan_v1(%choice, N, T, H, W, start, ...)
        %q1, %k1, %v1 = gather_tokens_v1(%q | %k | %v, %rows, H)
        %out1, _ = block_sparse_attention_v2(%q1, %k1, %v1, %counts, %indices, ...)
        %out = scatter_tokens_v1(%out1, %inverse)

    and under those that weigh blocks, in one order for all heads::

        %rows, %inverse = cube_order_v1(%q, T, H, W, start, N)
        %q1, %k1, %v1 = index_select(%q | %k | %v, tokens, %rows)
        %counts, %indices, %recall, %density = subblock_plan_v1(%q1, %k1, ...)
        %tail = summarize_blocks_v1(%k1, %v1, ...)
        %out1, _ = block_sparse_attention_v2(%q1, %k1, %v1, %counts, %indices, ..., *%tail)
        %out = index_select(%out1, tokens, %inverse)

    What a later call needs of the plan (the choice, or counts and indices), the recall and the
    density are also outputs of the graph. With `reuse_plans=True` the plan is an input instead. A
    site without a grid stays in the model's own order.

    Refuses nothing: sites that cannot be replaced must not be passed in.
    """
    sizes = SizeWriter(gm.graph)
    state: list[Node] = []
    for index, sparse in enumerate(sites):
        with gm.graph.inserting_before(sparse.site.node):
            state += _replace(gm, sparse, index, sizes, reuse_plans)
    if state:
        append_outputs(gm, state)
    gm.graph.lint()
    gm.recompile()
    return len(sites)


def name_choices(layout: tuple[int, ...]) -> tuple[str, ...]:
    """What the choices of a site stand for, as "temporal 1x1", by its (T, H, W, start, N)."""
    return candidate_names(*layout, BLOCK_Q, BLOCK_K)


def _replace(
    gm: GraphModule, sparse: SparseSite, index: int, sizes: SizeWriter, reuse_plans: bool
) -> list[Node]:
    """Write the ops of one site before it and drop it; returns the nodes to hand out as state."""
    graph, ops, site = gm.graph, torch.ops.ditopt, sparse.site
    call = graph.call_function
    qkv = [site.query, site.key, site.value]
    flat = site.query.meta["example_value"].dim() == 3
    if flat:
        qkv = [graph.call_method("unsqueeze", (x, 1)) for x in qkv]
    bias = _write_key_bias(graph, sparse.key_mask)
    routed = write_plan(gm, sparse, index, qkv, bias, sizes, reuse_plans)
    inputs = (routed.q, routed.k, routed.v, routed.counts, routed.indices, routed.bias)
    tail = ()
    if sparse.tail == "centroid" and sparse.router != "full":
        summary = call(ops.summarize_blocks_v1.default, (routed.k, routed.v, routed.bias, BLOCK_K))
        tail = unpack(graph, summary, 3)
    pair = call(
        ops.block_sparse_attention_v2.default, (*inputs, sparse.scale, BLOCK_Q, BLOCK_K, *tail)
    )
    out = routed.restore(graph, call(operator.getitem, (pair, 0)))
    if sparse.mask_queries:
        rows = graph.call_method("unsqueeze", (bias, -1))
        zeros = call(torch.zeros_like, (out,))
        out = call(torch.where, (call(torch.isneginf, (rows,)), zeros, out))
    if flat:
        out = graph.call_method("squeeze", (out, 1))
    out.meta = {**site.node.meta}
    site.node.replace_all_uses_with(out)
    graph.erase_node(site.node)
    return [] if reuse_plans else [*routed.plan, *routed.statistics]


def _write_key_bias(graph: Graph, mask: Node | None) -> Node | None:
    """The mask as an additive fp32 bias `[B, 1, Nk]`."""
    if mask is None:
        return None
    example = mask.meta["example_value"]
    length = graph.call_function(torch.ops.aten.sym_size.int, (mask, -1))
    flat = graph.call_method("reshape", (mask, -1, 1, length))
    if example.dtype != torch.bool:
        return graph.call_method("to", (flat, torch.float32))
    zero = graph.call_method("to", (flat, torch.float32))
    zeros = graph.call_function(torch.zeros_like, (zero,))
    return graph.call_function(torch.where, (flat, zeros, float("-inf")))
