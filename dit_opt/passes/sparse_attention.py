"""Replace attention sites by block-sparse attention.

The pass that the project is about; everything it needs to know was decided before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from dit_opt.facts.sites import Site
from dit_opt.kernels.routers.rainfusion import candidate_names
from dit_opt.passes.graph_edit import append_outputs, append_placeholder
from dit_opt.passes.symbolic_sizes import SizeWriter

# queries need 128 rows a tile (L2 bandwidth on GPUs); keys may be finer
BLOCK_Q = 128
BLOCK_K = 64


@dataclass(frozen=True)
class SparseSite:
    """One site to replace.

    Attributes:
        site: the attention call.
        grid: (T, H, W) of the latent tokens; None keeps every block, in the graph's own order.
        start: where the latent tokens start in the site's sequence.
        key_mask: node of a key-padding mask whose last dimension is the keys, or None.
        mask_queries: rows of masked tokens see no key either, and attend to nothing.
        scale: factor of the scores.
        target: softmax mass to keep per head, or the density to stay under.
        by_density: which of the two `target` is.
    """

    site: Site
    grid: tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None
    start: sympy.Expr
    key_mask: Node | None
    mask_queries: bool
    scale: float
    target: float
    by_density: bool


def sparse_attention(
    gm: GraphModule, sites: Sequence[SparseSite], reuse_plans: bool = False
) -> int:
    """Rewrite the sites in `gm`; returns how many there were.

    Triggers on the sites it is given, each one `scaled_dot_product_attention` call::

        %out = scaled_dot_product_attention(%q, %k, %v)

    becomes, with `reuse_plans=False` (the plan is also an output of the graph)::

        %choice, %recall, %density = rainfusion_recognize_v1(%q, %k, ..., T, H, W, start)
        %counts, %indices, %rows, %inverse = rainfusion_plan_v1(%choice, N, T, H, W, start, ...)
        %q1, %k1, %v1 = gather_tokens_v1(%q | %k | %v, %rows, H)
        %out1, _ = block_sparse_attention_v2(%q1, %k1, %v1, %counts, %indices, ...)
        %out = scatter_tokens_v1(%out1, %inverse)

    With `reuse_plans=True`, `%choice` is a new placeholder instead. A site without a grid gets
    `dense_plan_v1` and no gathers.

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
    q, k, v = qkv
    bias = bias_before_order = _write_key_bias(graph, sparse.key_mask)
    state: list[Node] = []
    blocks = (BLOCK_Q, BLOCK_K)
    if sparse.grid is None:
        length = call(torch.ops.aten.sym_size.int, (k, -2))
        plan = call(ops.dense_plan_v1.default, (q, length, *blocks))
        counts, indices = _unpack(graph, plan, 2)
        pair = call(
            ops.block_sparse_attention_v2.default,
            (q, k, v, counts, indices, bias, sparse.scale, *blocks),
        )
        out = call(operator.getitem, (pair, 0))
    else:
        where = [sizes.write(s) for s in (*sparse.grid, sparse.start)]
        if reuse_plans:
            choice = _state_input(gm, f"ditopt_plan_{index}", q)
        else:
            found = call(
                ops.rainfusion_recognize_v1.default,
                (q, k, bias, sparse.scale, sparse.target, sparse.by_density, *where, *blocks),
            )
            state = _unpack(graph, found, 3)
            choice = state[0]
        length = call(torch.ops.aten.sym_size.int, (q, -2))
        plan = call(ops.rainfusion_plan_v1.default, (choice, length, *where, *blocks))
        counts, indices, rows, inverse = _unpack(graph, plan, 4)
        q, k, v = (call(ops.gather_tokens_v1.default, (x, rows)) for x in (q, k, v))
        if bias is not None:
            bias = call(ops.gather_bias_v1.default, (bias, rows))
        pair = call(
            ops.block_sparse_attention_v2.default,
            (q, k, v, counts, indices, bias, sparse.scale, *blocks),
        )
        out = call(operator.getitem, (pair, 0))
        out = call(ops.scatter_tokens_v1.default, (out, inverse))
    if sparse.mask_queries:
        rows = graph.call_method("unsqueeze", (bias_before_order, -1))
        zeros = call(torch.zeros_like, (out,))
        out = call(torch.where, (call(torch.isneginf, (rows,)), zeros, out))
    if flat:
        out = graph.call_method("squeeze", (out, 1))
    out.meta = {**site.node.meta}
    site.node.replace_all_uses_with(out)
    graph.erase_node(site.node)
    return state


def _unpack(graph: Graph, node: Node, count: int) -> list[Node]:
    return [graph.call_function(operator.getitem, (node, i)) for i in range(count)]


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


def _state_input(gm: GraphModule, name: str, q: Node) -> Node:
    """A placeholder for a plan: int32 `[B, H]`, sized as the query."""
    example = q.meta["example_value"]
    batch, heads = (example.shape[0], 1) if example.dim() == 3 else example.shape[:2]
    return append_placeholder(gm, name, example.new_empty((batch, heads), dtype=torch.int32))
