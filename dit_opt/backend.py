"""What Dynamo calls: read a graph's facts, run the passes, hand it to Inductor, bind the result.

`torch.compile(model, backend="ditopt")` finds it through an entry point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from dit_opt import passes
from dit_opt.facts.graph import InputHints
from dit_opt.facts.token_ids import TokenIds
from dit_opt.inspect.summary import log_summary, warn_of_sizes
from dit_opt.kernels.cpp.build import build_ahead
from dit_opt.options import Options
from dit_opt.passes.base import Lowering, run
from dit_opt.program.dump import Dumper
from dit_opt.program.edit import copy_graph
from dit_opt.program.program import Program
from dit_opt.program.signature import Signature, find_user_inputs, read_signature
from dit_opt.runtime.bound import Bound, find_device, refuse_gradients
from dit_opt.runtime.compiler import VariantCompiler
from dit_opt.runtime.registry import register, reset
from dit_opt.runtime.specialize import LayoutHints, LayoutSpecializer, read_hints
from dit_opt.runtime.token_ids import read_grid


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
        NothingReplaced: see `dit_opt.inspect.summary`.
    """
    parsed = Options.parse(options, mode=mode)
    inputs = list(example_inputs)
    refuse_gradients(tuple(inputs))
    if parsed.grid is not None:
        return _compile(gm, inputs, parsed, InputHints())[0]
    user_inputs = find_user_inputs(gm.graph)
    hints = read_hints(inputs, user_inputs)
    if _has_symbols(gm, inputs):
        # spans hold of one call only; whether the sizes still fit a grid can be told
        bound, _ = _compile(gm, inputs, parsed, InputHints(grid=hints.grid))
        warn_of_sizes(bound.record, inputs)
        return bound
    known = _to_input_hints(hints, lambda ids: read_grid(inputs[ids.argument], *ids[1:]))
    first, token_ids = _compile(gm, inputs, parsed, known)
    hints = read_hints(inputs, user_inputs, token_ids)
    if not hints:
        return first
    source = copy_graph(gm)
    fakes = _fake_inputs(source, inputs)

    def bind(other: LayoutHints) -> Bound:
        id_grids = dict(zip(token_ids, other.id_grids, strict=True))
        return _compile(source, fakes, parsed, _to_input_hints(other, id_grids.get))[0]

    return LayoutSpecializer(bind, hints, first, user_inputs, token_ids)


def _compile(
    gm: GraphModule, inputs: list[Any], options: Options, hints: InputHints
) -> tuple[Bound, tuple[TokenIds, ...]]:
    """The bound graph, and the inputs whose values may give the grid."""
    # Dynamo changes and clears its graph once the backend has returned; this one is a copy.
    program = Program(gm, hints)
    signature = read_signature(program.facts)
    ids = () if hints.read_grid is None else program.facts.token_ids.values()
    token_ids = tuple(dict.fromkeys(itertools.chain.from_iterable(ids)))
    lowering = run(passes.PASSES, program, options, Dumper(options.dump))
    log_summary(lowering.record, options, signature.forwards_latents)
    # they may read the inputs of this call, which must not live as long as the program
    program.facts.hints = InputHints()
    bound = _bind(gm, inputs, signature, lowering)
    register(bound)
    return bound, token_ids


def _to_input_hints(
    hints: LayoutHints, read: Callable[[TokenIds], tuple[int, int, int] | None]
) -> InputHints:
    """What facts are read with; where the whole model's grid is known, no ids are read."""
    return InputHints(dict(hints.spans), read if hints.grid is None else None, hints.grid)


def _bind(gm: GraphModule, inputs: list[Any], signature: Signature, lowering: Lowering) -> Bound:
    """The program with its variants, each compiled on first use."""
    program, record = lowering.program, lowering.record
    fakes = _fake_inputs(gm, inputs)
    if record.replaced and find_device(fakes).type == "cpu":
        build_ahead()
    compiler = VariantCompiler(inputs, lowering.options.inductor_patches())
    bound = Bound(
        lambda mode: compiler.compile(lowering.make_variant(mode).graph),
        signature,
        program.plan,
        program.main.gm.graph,
        record,
        [compiler.compile_piece(piece) for piece in program.pieces],
    )
    # While Dynamo traces, the symbols of a graph may still gain guards; later they may not. A
    # static graph has none, so its variants can wait for their first use.
    modes = program.plan.modes if _has_symbols(gm, inputs) else {program.plan.first_mode}
    for mode in sorted(modes, key=lambda m: m.value):
        bound.variant(mode)
    # What waits is compiled outside of Dynamo's tracing, where real inputs would be given dynamic
    # shapes; and they would stay alive until then. Fake ones have the shapes that Dynamo proved.
    compiler.inputs = fakes
    return bound


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


ditopt.reset = reset  # type: ignore[attr-defined]
