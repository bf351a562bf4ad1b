"""Differences to dense attention as advice: what to keep dense, and what is not a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from dit_opt.inspect.records import LayerReport

# of a layer's output, in L2 relative to dense attention
LARGE_DIFFERENCE = 0.1


def suggest_dense(layers: Sequence[LayerReport]) -> str:
    """Which steps and layers differ from dense attention by more than `LARGE_DIFFERENCE`.

    Steps first: a layer is named for those only that remain sparse. What is not a number differs,
    and is also named.
    """
    steps = sorted({step for layer in layers for step in layer.differences})
    large = [
        step
        for step in steps
        if _is_large([d for layer in layers if (d := layer.differences.get(step)) is not None])
    ]
    first = large[-1] + 1 if large else 0
    names = {
        layer.module
        for layer in layers
        if (rest := [d for step, d in layer.differences.items() if step >= first])
        and _is_large(rest)
    }
    advice = [f"dense_steps={first}"] if large else []
    advice += [f"a larger quality or density for {name}" for name in sorted(names)]
    bound = f"{LARGE_DIFFERENCE:.0%}"
    if not advice:
        return f"No step and no layer differs from dense attention by more than {bound} on average."
    text = f"More than {bound} from dense attention on average; consider {', '.join(advice)}."
    return " ".join(filter(None, (_name_nan(layers), text)))


def _is_large(differences: Sequence[float]) -> bool:
    # a comparison with NaN is false
    return not mean(differences) <= LARGE_DIFFERENCE


def _name_nan(layers: Sequence[LayerReport]) -> str:
    """Where the output is not a number and that of dense attention is one, or ""."""
    found = [
        (step, layer.module)
        for layer in layers
        for step, difference in layer.differences.items()
        if math.isnan(difference)
    ]
    if not found:
        return ""
    modules = ", ".join(dict.fromkeys(module for _, module in found))
    return f"The output is not a number, first at step {min(found)[0]}, in {modules}."
