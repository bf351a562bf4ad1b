"""What Dynamo calls: read a graph's facts, run the passes, hand it to Inductor, bind the result.

`torch.compile(model, backend="ditopt")` finds it through an entry point.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

# registering ops is a side effect that must happen before any tracing
import dit_opt.kernels.block_sparse_attention
import dit_opt.kernels.norm_rope
import dit_opt.kernels.searches
import dit_opt.kernels.token_order  # noqa: F401
from dit_opt._compat import cache_counts, compile_with_inductor
from dit_opt.analysis import Analysis, analyse
from dit_opt.call_sizes import count_heads, count_outputs, count_tokens, read_sizes
from dit_opt.decisions import GraphRecord
from dit_opt.facts.nodes import origin_of
from dit_opt.facts.order import OrderRegion
from dit_opt.facts.positions import Positions
from dit_opt.facts.provenance import layer_anchor, model_anchor
from dit_opt.facts.sites import Form, Site, find_sites
from dit_opt.inspect.announce import announce, warn_of_sizes
from dit_opt.inspect.dump import Dumper
from dit_opt.kernels.cpp.build import build_ahead
from dit_opt.options import OptionError, Options
from dit_opt.passes.canonicalize_attention import canonicalize_attention
from dit_opt.passes.graph_edit import copy_graph
from dit_opt.passes.held_tables import hold_order, hold_tables
from dit_opt.passes.plan_nodes import can_ask, count_plan_tensors, make_blank_plan
from dit_opt.passes.qk_prologue import fold_orders, fuse_prologues
from dit_opt.passes.sparse_attention import sparse_attention
from dit_opt.passes.sparse_site import SparseForm, SparseSite
from dit_opt.passes.token_order import order_by_cubes
from dit_opt.runtime.bound import Bound, Wiring, refuse_gradients
from dit_opt.runtime.by_layout import ByLayout, Told, read_told
from dit_opt.runtime.positions import read_grid
from dit_opt.runtime.schedule import Phase, Schedule
from dit_opt.runtime.state import forget_clocks

log = logging.getLogger(__name__)


# in the order in which they were compiled
_bounds: weakref.WeakKeyDictionary[Bound, None] = weakref.WeakKeyDictionary()


def ditopt(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend.

    Args:
        gm: a graph from Dynamo; never changed here.
        example_inputs: its inputs, fake or real.
        mode, options: as given to `torch.compile`; see `Options`.

    Raises:
        OptionError: options that are wrong in themselves or for this graph.
        GradientError: an input or weight requires grad and gradients are on.
        NothingReplaced: see `dit_opt.inspect.announce`.
    """
    parsed = Options.parse(options, mode=mode)
    inputs = list(example_inputs)
    refuse_gradients(tuple(inputs))
    given = _find_given(gm)
    if parsed.grid is not None:
        return _compile(gm, inputs, parsed, Told())[0]
    told = read_told(inputs, given)
    if _has_symbols(gm, inputs):
        # spans hold of one call only; whether the sizes still fit a grid can be told
        bound, _ = _compile(gm, inputs, parsed, Told(told.grid))
        warn_of_sizes(bound.record, inputs)
        return bound
    first, positions = _compile(gm, inputs, parsed, told, lambda p: read_grid(inputs[p[0]], *p[1:]))
    told = read_told(inputs, given, positions)
    if not told:
        return first
    source = copy_graph(gm)
    fakes = _fake_inputs(source, inputs)

    def bind(other: Told) -> Bound:
        numbered = dict(zip(positions, other.numbered, strict=True))
        return _compile(copy_graph(source), fakes, parsed, other, numbered.get)[0]

    return ByLayout(bind, told, first, given, positions)


def _compile(
    gm: GraphModule,
    inputs: list[Any],
    options: Options,
    told: Told,
    read: Callable[[Positions], tuple[int, int, int] | None] | None = None,
) -> tuple[Bound, tuple[Positions, ...]]:
    """Facts, decisions and the bound graph; where `read` may be asked for the grid."""
    analysis, passes = analyse(gm, options, told.grid, dict(told.spans), read)
    dumper = Dumper(options.dump)
    dumper.graph("capture", gm)
    record = analysis.describe(passes)
    announce(record, options, analysis.tokens.hands_on)
    bound = _bind(gm, inputs, analysis, options, record, dumper)
    _bounds[bound] = None
    return bound, analysis.positions


def _bind(
    gm: GraphModule,
    inputs: list[Any],
    analysis: Analysis,
    options: Options,
    record: GraphRecord,
    dumper: Dumper,
) -> Bound:
    sparse = analysis.sparse
    searching = [s for s in sparse if s.router != "full"]
    placeholders = gm.graph.find_nodes(op="placeholder")
    position = {n: i for i, n in enumerate(placeholders)}
    anchors = [layer_anchor(s.site, gm.graph) for s in searching]
    layers = tuple(position[a] if a is not None else None for a in anchors)
    model = model_anchor(gm.graph)

    phases = {Phase.OBSERVE}
    if any(s.example.device.type == "cpu" for s in sparse):
        build_ahead()
    if sparse:
        phases.add(Phase.SEARCH)
        if (
            searching
            and options.effective_refresh_every > 1
            and _tell_layers(searching, layers, options)
        ):
            phases.add(Phase.REUSE)
            if options.verify_every:
                phases.add(Phase.VERIFY)
    forms = {phase: _choose_form(phase, options) for phase in phases - {Phase.OBSERVE}}
    asks = Phase.REUSE in phases and _can_ask(searching, options)
    if asks:
        asking = dataclasses.replace(forms[Phase.SEARCH], asks=True)
        forms |= dict.fromkeys((Phase.SEARCH, Phase.REUSE), asking)
    plan_tensors = count_plan_tensors(options.effective_router, options.verify_every is not None)
    heads = read_sizes([e for s in searching for e in count_heads(s)], placeholders)
    lengths = [count_tokens(s) for s in sparse]
    layouts = [(*(s.grid or (0, 0, 0)), s.start, count_tokens(s)) for s in searching]
    flat = read_sizes([e for layout in layouts for e in layout], placeholders)
    # without a grid, a site is a row of tokens to its ops
    places = [(*(s.grid or (1, 1, s.video)), s.start, count_tokens(s)) for s in searching]
    where = read_sizes([e for place in places for e in place], placeholders)
    region = analysis.order if isinstance(analysis.order, OrderRegion) else None
    ordered = read_sizes([] if region is None else [*region.grid, region.length], placeholders)

    def hold(args: tuple[Any, ...], device: torch.device) -> list[Any]:
        five = zip(*[iter(where(args))] * 5)
        held = [hold_tables(s, place, device) for s, place in zip(searching, five, strict=True)]
        if region is not None:
            *grid, length = ordered(args)
            held.append(hold_order(tuple(grid), length, device))
        return held

    wiring = Wiring(
        outputs=count_outputs(gm),
        timesteps=analysis.timesteps,
        model=position[model] if model is not None else None,
        layers=layers,
        state={phase: form.name_outputs(plan_tensors) for phase, form in forms.items()},
        heads=lambda args: list(zip(*[iter(heads(args))] * 2)),
        layouts=lambda args: list(zip(*[iter(flat(args))] * 5)),
        hold=hold,
        lengths=read_sizes(lengths, placeholders),
        min_tokens=tuple(site.min_tokens for site in sparse),
        blank_plan=make_blank_plan if asks else None,
        given=_find_given(gm),
        spans=analysis.tokens.spans,
    )

    # Dynamo changes and clears its graph once the backend has returned
    source = copy_graph(gm)
    examples, patches = inputs, options.inductor_patches()
    lock = threading.Lock()

    def compile_variant(phase: Phase) -> tuple[Callable[..., Any], bool]:
        with lock:
            copy = copy_graph(source)
            extra = []
            if phase is not Phase.OBSERVE:
                extra = _rewrite(copy, analysis, phase, forms[phase], dumper)
            hits, _ = cache_counts()
            compiled = compile_with_inductor(copy, examples + extra, patches)
            return compiled, cache_counts()[0] > hits

    bound = Bound(
        compile_variant,
        frozenset(phases),
        wiring,
        make_schedule(options),
        record,
    )
    # While Dynamo traces, the symbols of a graph may still gain guards; later they may not. A
    # static graph has none, so its variants can wait for their first use.
    needed = phases if _has_symbols(gm, inputs) else {_first_phase(bound)}
    for phase in sorted(needed, key=lambda p: p.value):
        bound.variant(phase)
    # What waits is compiled outside of Dynamo's tracing, where real inputs would be given dynamic
    # shapes; and they would stay alive until then. Fake ones have the shapes that Dynamo proved.
    examples = _fake_inputs(source, inputs)
    return bound


def _find_given(gm: GraphModule) -> tuple[int, ...]:
    """Positions of the inputs that are not the model's own."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return tuple(i for i, node in enumerate(placeholders) if origin_of(node)[1])


def _fake_inputs(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """What Dynamo traced with, in place of the inputs of its first call."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [
        node.meta.get("example_value", given)
        for node, given in zip(placeholders, inputs, strict=True)
    ]


def _has_symbols(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a graph has sizes or numbers that are known only when it runs."""
    reads = gm.graph.find_nodes(op="call_method", target="item")
    return bool(reads) or any(isinstance(i, torch.SymInt) for i in inputs)


def _tell_layers(
    searching: Sequence[SparseSite], layers: Sequence[int | None], options: Options
) -> bool:
    """Whether a parameter tells the layer of each site, so that plans can be kept.

    Raises OptionError where they cannot but the options ask for it.
    """
    for sparse, layer in zip(searching, layers, strict=True):
        if layer is not None:
            continue
        if options.refresh_every is None:
            return False
        raise OptionError(
            f"refresh_every={options.refresh_every} keeps plans between steps, but no "
            f"parameter feeds the attention of {sparse.site.module or 'a site'}, so its plan "
            "could not be told from another layer's. Use refresh_every=1."
        )
    return True


def _can_ask(searching: Sequence[SparseSite], options: Options) -> bool:
    """Whether one variant can search or reuse, as an input tells it, which halves compile time.

    Not on GPUs, where a CUDA graph would go on doing what it did when it was recorded, and not
    under the guard, whose checks are a variant of their own.
    """
    return options.verify_every is None and all(
        can_ask(s.router) and s.example.device.type == "cpu" for s in searching
    )


def _first_phase(bound: Bound) -> Phase:
    sparse_first = Phase.SEARCH in bound.phases and not bound.schedule.dense_steps
    return Phase.SEARCH if sparse_first else Phase.OBSERVE


def make_schedule(options: Options) -> Schedule:
    """When the options are dense, search and check."""
    return Schedule(
        options.effective_dense_steps, options.effective_refresh_every, options.verify_every or 0
    )


def _choose_form(phase: Phase, options: Options) -> SparseForm:
    return SparseForm(
        reuse=phase in (Phase.REUSE, Phase.VERIFY),
        guard=options.verify_every is not None and phase is not Phase.REUSE,
        compare=options.verify,
        boosted=options.verify_every is not None,
    )


def _rewrite(
    copy: GraphModule, analysis: Analysis, phase: Phase, form: SparseForm, dumper: Dumper
) -> list[Any]:
    """Run the passes on a copy; returns example values of the placeholders they added."""
    at = {n.name: n for n in copy.graph.nodes}
    before = len(copy.graph.find_nodes(op="placeholder"))
    chosen = {s.site.index: s for s in analysis.sparse}
    if isinstance(analysis.order, OrderRegion):
        with dumper.around("order_tokens", copy, phase.value):
            at |= order_by_cubes(copy, analysis.order.moved(at), analysis.sparse[0].example.device)
    sites = find_sites(copy.graph)
    decomposed = [s for s in sites if s.index in chosen and s.form is Form.DECOMPOSED]
    if decomposed:
        with dumper.around("canonicalize_attention", copy, phase.value):
            canonicalize_attention(copy, decomposed)
        sites = find_sites(copy.graph)
    written: list[Node] = []
    if analysis.prologue:
        with dumper.around("fuse_prologues", copy, phase.value):
            written = fuse_prologues(copy, [s for s in sites if s.index in chosen])
        sites = find_sites(copy.graph)
    with dumper.around("sparse_attention", copy, phase.value):
        sparse_attention(
            copy,
            [_replace_site(chosen[s.index], s, at) for s in sites if s.index in chosen],
            form,
        )
    if written:
        with dumper.around("fold_orders", copy, phase.value):
            fold_orders(copy, written)
    added = copy.graph.find_nodes(op="placeholder")[before:]
    return [n.meta["example_value"] for n in added]


def _replace_site(sparse: SparseSite, site: Site, at: dict[str, Any]) -> SparseSite:
    mask = None if sparse.key_mask is None else at[sparse.key_mask.name]
    return dataclasses.replace(sparse, site=site, key_mask=mask)


def live_bounds() -> list[Bound]:
    """Every compiled graph that Dynamo still holds, the earliest first."""
    return list(_bounds)


def reset() -> None:
    """Forget all plans, statistics and trajectories; `torch.compiler.reset()` calls it too."""
    for bound in live_bounds():
        bound.forget()
    forget_clocks()


ditopt.reset = reset  # type: ignore[attr-defined]
