"""Modes: the variants that one graph is compiled to, and when each of them is due."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Mode(enum.Enum):
    """How attention runs in a call."""

    # as plain Inductor runs it
    DENSE = "dense"
    # sparse, with plans that are searched in this call
    SEARCH = "search"
    # sparse, with the plans of an earlier call
    REUSE = "reuse"
    # the same, and the guard checks the plans first
    VERIFY = "verify"


@dataclass(frozen=True)
class Schedule:
    """When to be dense, to search and to check.

    Attributes:
        dense_steps: steps at the start of a run (int), or a share of the noise range (float).
        refresh_every: steps between two searches. verify_every: between two checks; 0 for none.
    """

    dense_steps: int | float = 0
    refresh_every: int = 1
    verify_every: int = 0
