"""Replace attention sites by block-sparse attention: the pass that the project is about.

Whether and how was decided before (`policy.choose_sites`); which blocks are kept, a router says.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from dit_opt.facts.graph import Facts
from dit_opt.facts.nodes import sizes_of
from dit_opt.options import OptionError, Options
from dit_opt.passes.base import Match, Pass
from dit_opt.policy.choose_sites import find_choices, find_sparse_sites
from dit_opt.policy.sparse_site import SparseSite
from dit_opt.program.emit import Emitter
from dit_opt.program.modes import Mode, Schedule
from dit_opt.program.program import LengthLimit, PinnedTable, Program, Variant
from dit_opt.program.sizes import SizeWriter
from dit_opt.program.slots import Key, Lives, Reduce, Slot, SlotRef
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Routed, SiteWriter
from dit_opt.routers.guard import write_check

_OF_PROCESS = {"lives": Lives.PROCESS, "reduce": Reduce.SUM}
# Statistics, float32 [B, H]: density of every sparse call as executed, 1 for a head that the guard
# caught; recall of every search.
DENSITY = Slot("attention.density", **_OF_PROCESS)
RECALL = Slot("attention.recall", **_OF_PROCESS)
# of the plan in use
PLAN_DENSITY = Slot("attention.plan_density", blank=0.0)
# relative L2 difference to dense attention, by step
DIFFERENCE = Slot(
    "attention.difference",
    key=frozenset({Key.LAYER, Key.BRANCH, Key.STREAM, Key.STEP}),
    lives=Lives.PROCESS,
)
# whether any head of the graph was caught in the last call
ALARM = Slot(
    "guard.alarm", frozenset({Key.BRANCH, Key.STREAM}), lives=Lives.PROCESS, reduce=Reduce.FLAG
)


class SparseAttention(Pass):
    """Block-sparse attention in place of `scaled_dot_product_attention`.

    Triggers on the sites that `find_choices` accepted::

        %out = scaled_dot_product_attention(%q, %k, %v)

    becomes, in the mode `search`, under the router `headwise`::

        %counts, %indices, %order, %recall, %density = headwise_plan_v2(%q, %k, ..., T, H, W, ...)
        %rows, %inverse = headwise_rows_v1(%order, N, T, H, W, start, ...)
        %q1, %k1, %v1 = gather_tokens_v1(%q | %k | %v, %rows)
        %out1, _ = block_sparse_attention_v3(%q1, %k1, %v1, %counts, %indices, ...)
        %out = scatter_tokens_v1(%out1, %inverse)

    and under routers that weigh blocks in one order for all heads::

        %rows, %inverse = cube_order_v1(%q, T, H, W, start, N)
        %q1, %k1, %v1 = index_select(%q | %k | %v, tokens, %rows)
        %counts, %indices, %recall, %density = subblock_plan_v2(%q1, %k1, ...)
        %tail = summarize_blocks_v1(%k1, %v1, ...)
        %out1, _ = block_sparse_attention_v3(%q1, %k1, %v1, %counts, %indices, ..., *%tail)
        %out = index_select(%out1, tokens, %inverse)

    What a later call needs of the plan goes to the router's slots, recall and density to those of
    statistics. In the mode `reuse` the router's slots are read instead of a search::

        %counts, %indices = unpack_plan_v1(%words, N, ...)

    With `verify_every`, searches and the mode `verify` check a few rows of each plan before it is
    used, and heads whose plan keeps too little get every block::

        %counts1, %indices1, %mass, %error, %caught = guard_plan_v1(%q1, ..., %counts, %indices)

    On a CPU, where the router is `switchable` and no guard runs, one variant searches or reuses, as
    an input says. With `verify`, dense attention runs beside and its difference goes to a slot.

    Refuses what `find_choices` does; its reasons are `decisions.AttentionReason`.
    """

    name = "sparse_attention"
    sparse_only = True

    def find(self, facts: Facts, options: Options) -> list[Match]:
        chosen = {sparse.site.node: sparse for sparse in find_sparse_sites(facts, options)}
        choices = facts.get(find_choices, facts, options)
        return [Match(c.decision, c.node, chosen.get(c.node)) for c in choices]

    def declare(self, program: Program, matches: Sequence[Match], options: Options) -> None:
        sites: list[SparseSite] = [match.what for match in matches]
        searching = [sparse for sparse in sites if sparse.router.searches]
        modes = {Mode.DENSE, Mode.SEARCH}
        reuses = searching and options.effective_refresh_every > 1
        if reuses and _can_tell_layers(searching, options):
            modes.add(Mode.REUSE)
            if options.verify_every:
                modes.add(Mode.VERIFY)
        plan = program.plan
        plan.modes = frozenset(modes)
        plan.schedule = make_schedule(options, Mode.REUSE in modes)
        plan.limits += [LengthLimit(sparse.tokens, sparse.min_tokens) for sparse in sites]
        plan.pins += [_pin_tables(sparse) for sparse in searching]
        if Mode.REUSE in modes and _is_switched(searching, options):
            plan.served_by[Mode.REUSE] = Mode.SEARCH
        if options.verify_every and searching:
            plan.alarm = SlotRef(ALARM)

    def lower(self, variant: Variant, matches: Sequence[Match], options: Options) -> None:
        writer = _SiteRewriter(variant, options)
        for match in matches:
            writer.rewrite(match.what)
        writer.raise_alarm()


def make_schedule(options: Options, reuses: bool = True) -> Schedule:
    """When the options are dense, search and check."""
    refresh_every = options.effective_refresh_every if reuses else 1
    return Schedule(options.effective_dense_steps, refresh_every, options.verify_every or 0)


def _can_tell_layers(searching: Sequence[SparseSite], options: Options) -> bool:
    """Whether a parameter identifies the layer of each site, so that plans can be kept.

    Raises OptionError where none does but the options ask for it.
    """
    for sparse in searching:
        if sparse.anchor is not None:
            continue
        if options.refresh_every is None:
            return False
        raise OptionError(
            f"refresh_every={options.refresh_every} keeps plans between steps, but no "
            f"parameter feeds the attention of {sparse.site.module or 'a site'}, so its plan "
            "could not be told from another layer's. Use refresh_every=1."
        )
    return True


def _is_switched(searching: Sequence[SparseSite], options: Options) -> bool:
    """Whether one variant searches or reuses. The guard's checks are a variant of their own."""
    return options.verify_every is None and all(
        sparse.router.switchable and sparse.example.device.type == "cpu" for sparse in searching
    )


def _pin_tables(sparse: SparseSite) -> PinnedTable:
    make = sparse.router.pin_tables(sparse.goal)
    return PinnedTable(sparse.site.index, sparse.layout, make)


class _SiteRewriter:
    """Writes the sites of one variant."""

    def __init__(self, variant: Variant, options: Options) -> None:
        self._variant, self._options = variant, options
        self._graph, self._mode = variant.graph, variant.mode
        self._guarded = options.verify_every is not None and variant.mode is not Mode.REUSE
        self._switched = Mode.REUSE in variant.plan.served_by
        self._sizes = SizeWriter(variant.graph.gm.graph)
        self._placeholders = variant.graph.gm.graph.find_nodes(op="placeholder")
        self._caught: list[Node] = []

    def rewrite(self, sparse: SparseSite) -> None:
        """Write the ops of one site in front of it, and drop it."""
        call = self._variant.at[sparse.site.node]
        graph = self._graph.gm.graph
        with graph.inserting_before(call):
            emit = Emitter(graph, call)
            site = self._describe(sparse, call, emit)
            routed = self._route(sparse, site)
            out = self._attend(sparse, site, routed)
            if sparse.mask_queries:
                rows = emit.method("unsqueeze", site.bias, -1)
                zeros = emit.call(torch.zeros_like, out)
                out = emit.call(torch.where, emit.call(torch.isneginf, rows), zeros, out)
            if sparse.example.dim() == 3:
                out = emit.method("squeeze", out, 1)
        call.replace_all_uses_with(out)
        if not (self._options.verify and sparse.router.searches):
            graph.erase_node(call)
            return
        # the dense call stands behind what was written
        with graph.inserting_after(call):
            difference = emit.call(torch.ops.ditopt.compare_heads_v1.default, out, call)
        self._graph.write(site.ref(DIFFERENCE), difference)

    def raise_alarm(self) -> None:
        """Hand out whether the guard caught any head of the graph."""
        if not self._caught:
            return
        last = max(self._caught)
        with self._graph.gm.graph.inserting_after(last):
            emit = Emitter(self._graph.gm.graph, last)
            stacked = emit.call(torch.stack, self._caught)
        with self._graph.gm.graph.inserting_after(stacked):
            raised = emit.method("any", stacked)
        self._graph.write(SlotRef(ALARM), raised)

    def _describe(self, sparse: SparseSite, call: Node, emit: Emitter) -> SiteWriter:
        at = self._variant.at
        qkv = [_cast(emit, at[node], call) for node in sparse.qkv]
        if sparse.example.dim() == 3:
            qkv = [emit.method("unsqueeze", x, 1) for x in qkv]
        mask = None if sparse.key_mask is None else at[sparse.key_mask]
        t, h, w, start, _ = map(self._sizes.write, sparse.layout)
        anchor = None if sparse.anchor is None else at[sparse.anchor]
        return SiteWriter(
            graph=self._graph,
            emit=emit,
            place=sparse.site.index,
            anchor=None if anchor is None else self._placeholders.index(anchor),
            q=qkv[0],
            k=qkv[1],
            v=qkv[2],
            bias=_write_key_bias(emit, mask),
            scale=sparse.scale,
            goal=sparse.goal,
            grid=(t, h, w, start),
            video=self._sizes.write(sparse.video),
            has_grid=sparse.grid is not None,
            ordered=sparse.ordered,
            guarded=self._guarded,
            boosted=self._options.verify_every is not None,
        )

    def _route(self, sparse: SparseSite, site: SiteWriter) -> Routed:
        """Write the plan and what is kept of it, checked where the guard runs."""
        router, searches = sparse.router, self._mode is Mode.SEARCH
        if not router.searches:
            return router.search(site)
        if not searches:
            routed = router.restore(site)
            density = site.read(PLAN_DENSITY, dtype=torch.float32)
        elif self._switched:
            # a search or a restored plan, as the mode of the call says
            flag = self._graph.read_mode(Mode.SEARCH, sparse.example)
            routed = router.search_or_restore(site, flag)
            before = site.read(PLAN_DENSITY, dtype=torch.float32)
            density = _expand_heads(site, routed.statistics[1])
            density = site.emit.call(torch.where, flag, density, before)
            self._keep(site, routed, density, (Mode.SEARCH,))
        else:
            routed = router.search(site)
            density = _expand_heads(site, routed.statistics[1])
            self._keep(site, routed, density)
        if self._guarded:
            return self._check(site, routed, density)
        self._graph.write(site.ref(DENSITY), density)
        return routed

    def _keep(
        self, site: SiteWriter, routed: Routed, density: Node, modes: Sequence[Mode] = ()
    ) -> None:
        """Hand out what a search found; in calls of `modes` only, where there are any."""
        found = {**routed.state, RECALL: routed.statistics[0], PLAN_DENSITY: density}
        for slot, node in found.items():
            self._graph.write(site.ref(slot), node, modes)

    def _check(self, site: SiteWriter, routed: Routed, density: Node) -> Routed:
        """Let the guard check the plan, which goes on with every block for heads it caught."""
        checked, is_caught = write_check(site, routed, self._mode is Mode.SEARCH)
        emit = site.emit
        executed = emit.method("masked_fill", density, is_caught, 1.0)
        self._graph.write(site.ref(DENSITY), executed)
        self._caught.append(emit.method("any", is_caught))
        return checked

    def _attend(self, sparse: SparseSite, site: SiteWriter, routed: Routed) -> Node:
        emit, ops, tail = site.emit, torch.ops.ditopt, ()
        if sparse.tail == "centroid" and sparse.router.searches:
            summary = emit.call(
                ops.summarize_blocks_v1.default, routed.k, routed.v, routed.bias, BLOCK_K
            )
            tail = emit.unpack(summary, 3)
        inputs = (routed.q, routed.k, routed.v, routed.counts, routed.indices, routed.bias)
        pair = emit.call(
            ops.block_sparse_attention_v3.default,
            *(*inputs, sparse.scale, BLOCK_Q, BLOCK_K, *tail),
            with_lse=False,
        )
        return routed.restore(emit, emit.call(operator.getitem, pair, 0))


def _expand_heads(site: SiteWriter, density: Node) -> Node:
    """`[B or 1, H]` as `[B, H]`."""
    if sizes_of(density.meta["example_value"]) == sizes_of(site.q.meta["example_value"])[:2]:
        return density
    return site.emit.method("expand", density, site.emit.size(site.q, 0), -1)


def _cast(emit: Emitter, tensor: Node, call: Node) -> Node:
    """The tensor in the dtype of the call that takes it: autocast converts what it is given."""
    dtype = call.meta["example_value"].dtype
    if tensor.meta["example_value"].dtype == dtype:
        return tensor
    return emit.method("to", tensor, dtype)


def _write_key_bias(emit: Emitter, mask: Node | None) -> Node | None:
    """The mask as an additive fp32 bias `[B, 1, Nk]`."""
    if mask is None:
        return None
    flat = emit.method("reshape", mask, -1, 1, emit.size(mask, -1))
    bias = emit.method("to", flat, torch.float32)
    if mask.meta["example_value"].dtype != torch.bool:
        return bias
    return emit.call(torch.where, flat, emit.call(torch.zeros_like, bias), float("-inf"))
