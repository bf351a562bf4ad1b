"""What reports say, as data: no text is made here and nothing is read from a device."""

from __future__ import annotations

from dataclasses import dataclass, field

from dit_opt.decisions import GraphRecord


@dataclass(frozen=True)
class GuardReport:
    """What the guard found in one layer.

    Attributes:
        checks: how often it looked. kept, error: mass kept and relative L2 error of the plan on
            its rows, means over heads and checks. caught: heads that were caught, over all checks.
        dense_heads: heads that it keeps dense now.
    """

    checks: int
    kept: float
    error: float
    caught: int
    dense_heads: int


@dataclass(frozen=True)
class LayerReport:
    """One searching site of one layer, over all sparse calls of one guidance branch.

    Attributes:
        module: as "blocks.0.attn1". layer: name of the parameter that identifies the layer.
        branch: 0 conditional, 1 unconditional (in the order of calls).
        density: realised mean kept share, over heads and sparse calls, in real tokens; that of a
            head which the guard caught in a call is 1.
        recall: mean softmax mass inside the plans, as sampled at the searches; None where the
            router does not know it.
        heads: how many heads had each type at the last search, over the batch: their patterns
            under `rainfusion`, their orders of the tokens under `headwise`, else the router's name.
        density_by_type: mean density of the heads of each type at the last search.
        calls, searches: sparse calls, and those that searched.
        plan_bytes: memory of what is kept of the plan between calls.
        guard: what the guard found; None where it does not run.
        differences: relative L2 difference of the output to dense attention by step, the mean over
            heads; empty without `verify`.
    """

    module: str
    layer: str
    branch: int
    density: float
    recall: float | None
    heads: dict[str, int]
    density_by_type: dict[str, float]
    calls: int
    searches: int
    plan_bytes: int
    guard: GuardReport | None
    differences: dict[int, float]


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: what was decided, how often each mode ran, what its layers did.

    Attributes:
        warm: Inductor's artifacts came from its cache; None where nothing was compiled yet.
        lacks_step: calls stayed dense because nothing told the step at which the dense start ends.
        slot_bytes: memory of the values of slots, by the slot's name.
    """

    record: GraphRecord
    calls: dict[str, int]
    layers: tuple[LayerReport, ...]
    warm: bool | None
    lacks_step: bool = False
    slot_bytes: dict[str, int] = field(default_factory=dict)
