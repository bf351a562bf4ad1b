"""Replace attention sites by block-sparse attention.

The pass that the project is about; everything it needs to know was decided before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt.kernels.searches.headwise.head_orders import ORDER_NAMES
from dit_opt.kernels.searches.rainfusion.op import candidate_names
from dit_opt.passes.graph_edit import append_outputs
from dit_opt.passes.plan_nodes import Place, unpack, write_plan
from dit_opt.passes.sparse_site import BLOCK_K, BLOCK_Q, SLACK, SparseForm, SparseSite
from dit_opt.passes.symbolic_sizes import SizeWriter

_SEARCH = SparseForm()


def sparse_attention(
    gm: GraphModule, sites: Sequence[SparseSite], form: SparseForm = _SEARCH
) -> int:
    """Rewrite the sites in `gm`; returns how many there were.

    Triggers on the sites it is given, each one `scaled_dot_product_attention` call::

        %out = scaled_dot_product_attention(%q, %k, %v)

    becomes, when it searches, under the router `rainfusion`::

        %choice, %recall, %density = rainfusion_recognize_v1(%q, %k, ..., T, H, W, start)
        %counts, %indices, %rows, %inverse = rainfusion_plan_v1(%choice, N, T, H, W, start, ...)
        %q1, %k1, %v1 = gather_tokens_v1(%q | %k | %v, %rows, H)
        %out1, _ = block_sparse_attention_v3(%q1, %k1, %v1, %counts, %indices, ...)
        %out = scatter_tokens_v1(%out1, %inverse)

    under `headwise`, which finds lists and an order of the tokens for each head, alike::

        %counts, %indices, %order, %recall, %density = headwise_plan_v2(%q, %k, ..., T, H, W, ...)
        %rows, %inverse = headwise_rows_v1(%order, N, T, H, W, start, ...)

    and under those that weigh blocks in one order for all heads::

        %rows, %inverse = cube_order_v1(%q, T, H, W, start, N)
        %q1, %k1, %v1 = index_select(%q | %k | %v, tokens, %rows)
        %counts, %indices, %recall, %density = subblock_plan_v2(%q1, %k1, ...)
        %tail = summarize_blocks_v1(%k1, %v1, ...)
        %out1, _ = block_sparse_attention_v3(%q1, %k1, %v1, %counts, %indices, ..., *%tail)
        %out = index_select(%out1, tokens, %inverse)

    What a later call needs of the plan (the choice, or the lists in bits and the order), the recall
    and the density are also outputs of the graph. Under `form.reuse` the plan is an input instead::

        %counts, %indices = unpack_plan_v1(%words, N, ...)

    Under `form.asks` an input says in each call which of the two it is::

        %counts, %indices, %order, %words, ... = headwise_search_or_reuse_v1(%fresh, %words, ...)

    A site without a grid stays in the model's own order. Under `form.guard` the lists pass a check
    first::

        %counts1, %indices1, %kept, %error, %caught = guard_plan_v1(%q1, %k1, %v1, %counts, ...)

    and under `form.compare` the dense call stays, for its difference::

        %difference = compare_heads_v1(%out, %dense)

    What these find are outputs too; `SparseForm.name_outputs` tells all of them.

    Refuses nothing: sites that cannot be replaced must not be passed in.
    """
    sizes = SizeWriter(gm.graph)
    state: list[Node] = []
    for index, sparse in enumerate(sites):
        with gm.graph.inserting_before(sparse.site.node):
            state += _replace(gm, sparse, index, sizes, form)
    if state:
        append_outputs(gm, state)
    gm.graph.lint()
    gm.recompile()
    return len(sites)


def name_heads(
    router: str, layout: tuple[int, ...], plan: Sequence[torch.Tensor]
) -> list[str] | None:
    """What each head of a site is, from the plan in use; None where a router tells no heads apart.

    Its pattern under `rainfusion` ("temporal", from T, H, W, start and N), its order of the tokens
    under `headwise` ("columns").
    """
    if router == "rainfusion":
        names = candidate_names(*layout, BLOCK_Q, BLOCK_K)
        return [names[c].split()[0] for c in plan[0].flatten().tolist()]
    if router in ("headwise", "oracle"):
        return [ORDER_NAMES[i] for i in plan[1].flatten().tolist()]
    return None


def _replace(
    gm: GraphModule, sparse: SparseSite, index: int, sizes: SizeWriter, form: SparseForm
) -> list[Node]:
    """Write the ops of one site before it and drop it; returns the nodes to hand out as state."""
    graph, ops, site = gm.graph, torch.ops.ditopt, sparse.site
    call = graph.call_function
    qkv = [_cast(graph, x, site.node) for x in (site.query, site.key, site.value)]
    flat = site.query.meta["example_value"].dim() == 3
    if flat:
        qkv = [graph.call_method("unsqueeze", (x, 1)) for x in qkv]
    bias = _write_key_bias(graph, sparse.key_mask)
    routed = write_plan(Place(gm, index, sparse, form, qkv, bias, sizes))
    searching = sparse.router != "full"
    state = [] if form.reuse or not searching else [*routed.plan, *routed.statistics]
    qkv, lists = (routed.q, routed.k, routed.v), (routed.counts, routed.indices)
    if form.guard and searching:
        rule = (routed.bias, sparse.scale, routed.expected, SLACK, BLOCK_Q, BLOCK_K)
        checked = unpack(graph, call(ops.guard_plan_v1.default, (*qkv, *lists, *rule)), 5)
        lists, findings = tuple(checked[:2]), checked[2:]
        state += findings
    inputs = (*qkv, *lists, routed.bias)
    tail = ()
    if sparse.tail == "centroid" and searching:
        summary = call(ops.summarize_blocks_v1.default, (routed.k, routed.v, routed.bias, BLOCK_K))
        tail = unpack(graph, summary, 3)
    pair = call(
        ops.block_sparse_attention_v3.default,
        (*inputs, sparse.scale, BLOCK_Q, BLOCK_K, *tail),
        {"with_lse": False},
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
    if form.compare and searching:
        # after the dense call, which stands behind what was written
        with graph.inserting_after(site.node):
            state.append(call(ops.compare_heads_v1.default, (out, site.node)))
    else:
        graph.erase_node(site.node)
    return state


def _cast(graph: Graph, tensor: Node, call: Node) -> Node:
    """The tensor in the dtype of the call that takes it: autocast converts what it is given."""
    dtype = call.meta["example_value"].dtype
    if tensor.meta["example_value"].dtype == dtype:
        return tensor
    return graph.call_method("to", (tensor, dtype))


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
