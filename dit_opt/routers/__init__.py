"""Routers: one file for each way to choose the key blocks of a query block.

`ROUTERS` is the list of all that the option `router` may name. A new one is a file and a line here.
"""

from __future__ import annotations

import difflib

from dit_opt.routers.adaspa import AdaSpa
from dit_opt.routers.base import Router
from dit_opt.routers.frame_tile import FrameTile
from dit_opt.routers.headwise import Headwise
from dit_opt.routers.keep_all import KeepAll
from dit_opt.routers.oracle import Oracle
from dit_opt.routers.rainfusion import RainFusion
from dit_opt.routers.sol import Sol
from dit_opt.routers.subblock import SubBlock

ROUTERS: tuple[Router, ...] = (
    Headwise(),
    RainFusion(),
    AdaSpa(),
    SubBlock(),
    Sol(),
    FrameTile(),
    Oracle(),
)
# What `router="auto"` stands for: the best in benchmarks/results.
AUTO = "headwise"
KEEP_ALL = KeepAll()


def find_router(name: str) -> Router:
    """The router of a name, where "auto" is one of the others.

    Raises LookupError for a name that none has.
    """
    wanted = AUTO if name == "auto" else name
    for router in (*ROUTERS, KEEP_ALL):
        if router.name == wanted:
            return router
    known = [router.name for router in ROUTERS]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise LookupError(f"No router is called {name!r}; did you mean {near[0]!r}?")
