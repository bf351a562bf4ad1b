"""Arithmetic of sizes: sympy expressions, of which only what is proved is used.

Comparing SymInts would add guards; comparing their expressions adds none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import sympy

# (T, H, W) of tokens in one call
Grid: TypeAlias = "tuple[int, int, int]"


@lru_cache(maxsize=65536)
def are_equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes are proved equal."""
    return a == b or (not (a.is_Integer and b.is_Integer) and sympy.expand(a - b) == 0)


@lru_cache(maxsize=65536)
def divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b where that is proved to be a whole number, else None."""
    quotient = sympy.cancel(a / b) if not (a.is_Integer and b.is_Integer) else a / b
    return quotient if quotient.as_numer_denom()[1] == 1 else None
