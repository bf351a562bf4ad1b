"""ditopt: a compiler backend that makes diffusion transformers generate faster.

The public names are imported on first use, so that `import dit_opt` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_opt.backend import reset as reset
    from dit_opt.inspect.explain import explain as explain
    from dit_opt.inspect.report import report as report
    from dit_opt.options import Options as Options
    from dit_opt.pipeline import optimize as optimize

__version__ = "0.1.0"

__all__ = ["Options", "explain", "optimize", "report", "reset"]

_HOMES = {
    "Options": "dit_opt.options",
    "explain": "dit_opt.inspect.explain",
    "optimize": "dit_opt.pipeline",
    "report": "dit_opt.inspect.report",
    "reset": "dit_opt.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
