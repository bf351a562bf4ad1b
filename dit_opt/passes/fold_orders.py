"""Have the kernel of `fuse_qk` write tokens in each head's own order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from dit_opt.decisions import Decision, RewriteReason
from dit_opt.facts.graph import Facts
from dit_opt.facts.nodes import sizes_of
from dit_opt.options import Options
from dit_opt.passes.base import Match, Pass
from dit_opt.policy.choose_sites import find_sparse_sites
from dit_opt.policy.sparse_site import SparseSite
from dit_opt.program.edit import erase_unused
from dit_opt.program.program import Variant


class FoldOrders(Pass):
    """The gather of a query or key into its head's order becomes part of the kernel that writes it.

    Triggers on a call of `norm_rope_v1` that only a gather reads, in the modes where an order is
    known before queries and keys are there::

        %q = norm_rope_v1(%x, ..., None)
        %q1 = gather_tokens_v1(%q, %rows)

    becomes::

        %q1 = norm_rope_v1(%x, ..., %rows)

    Refuses what was put together from several calls, and keys of fewer heads than their queries,
    which have an order for each query. What a search reads too comes before its order is known.
    """

    name = "fold_orders"
    sparse_only = True

    def wanted(self, options: Options) -> bool:
        return options.fuse

    def find(self, facts: Facts, options: Options) -> list[Match]:
        found: dict[Node, Match] = {}
        for sparse in find_sparse_sites(facts, options):
            for node in sparse.qkv[:2]:
                if node.target is torch.ops.ditopt.norm_rope_v1.default:
                    found[node] = Match(_decide(sparse, node), node)
        return list(found.values())

    def lower(self, variant: Variant, matches: Sequence[Match], options: Options) -> None:
        for match in matches:
            if match.node is not None:
                _fold(variant, variant.at[match.node])


def _decide(sparse: SparseSite, node: Node) -> Decision:
    site, (query, key, _) = sparse.site, sparse.qkv
    heads = [sizes_of(n.meta["example_value"])[1] for n in (query, key)]
    if node is key and heads[0] != heads[1]:
        detail = "Each of its queries has an order, and it has fewer heads."
        return Decision(site.module, site.source, RewriteReason.NOT_PROVED, detail)
    return Decision(site.module, site.source, RewriteReason.REWRITTEN)


def _fold(variant: Variant, made: Node) -> None:
    graph = variant.graph.gm.graph
    gather = next(iter(made.users), None)
    if gather is None or len(made.users) > 1:
        return
    if gather.target is not torch.ops.ditopt.gather_tokens_v1.default:
        return
    with graph.inserting_before(gather):
        function = torch.ops.ditopt.norm_rope_v1.default
        node = graph.call_function(function, (*made.args[:-1], gather.args[1]))
    node.meta = {**gather.meta}
    gather.replace_all_uses_with(node)
    erase_unused(graph, [made, gather])
