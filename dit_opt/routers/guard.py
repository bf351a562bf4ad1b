"""The guard: a few dense rows beside each plan, which catch a head whose plan keeps too little.

Whichever router made the plan; it only sees block lists.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import Node

from dit_opt.program.slots import Lives, Reduce, Slot
from dit_opt.routers.base import BLOCK_K, BLOCK_Q, BOOST, Routed, SiteWriter

# What a plan may keep less than it did when it was made, or than was asked for.
SLACK = 0.05
# A head that was caught so often in a run stays dense to its end.
CATCHES_TO_DENSE = 3

# Float32 [B, H]. The mass that the plan in use kept on the guard's rows when it was made.
PLAN_MASS = Slot("guard.plan_mass")
# Sums over all checks: mass kept, error, and 1 for each head that was caught.
CHECKED_MASS = Slot("guard.mass", lives=Lives.PROCESS, reduce=Reduce.SUM)
CHECKED_ERROR = Slot("guard.error", lives=Lives.PROCESS, reduce=Reduce.SUM)
CAUGHT = Slot("guard.caught", lives=Lives.PROCESS, reduce=Reduce.SUM)


def write_check(site: SiteWriter, routed: Routed, searched: bool) -> tuple[Routed, Node]:
    """Write the check of a plan: the plan with every block for heads that were caught, and which.

    A plan that was `searched` in this call must keep what the router aimed at, where that is no
    density; one of an earlier call must keep the mass that it kept then.
    A head that was caught may drop half of what it might before, and none at all after
    `CATCHES_TO_DENSE` times in a run: its boost says so to the next search. The second result is
    bool `[B, H]`.
    """
    emit, graph = site.emit, site.graph
    expected = None
    if not searched:
        expected = site.read(PLAN_MASS, dtype=torch.float32)
    elif not site.goal.by_density:
        expected = emit.call(torch.full_like, routed.statistics[0], site.goal.target)
    checked = emit.call(
        torch.ops.ditopt.guard_plan_v1.default,
        *(routed.q, routed.k, routed.v, routed.counts, routed.indices, routed.bias),
        *(site.scale, expected, SLACK, BLOCK_Q, BLOCK_K),
    )
    counts, indices, mass, error, caught = emit.unpack(checked, 5)
    is_caught = emit.call(operator.gt, caught, 0)
    boost = site.read(BOOST, dtype=torch.float32)
    is_dense = emit.call(operator.ge, boost, 2.0 ** (CATCHES_TO_DENSE - 1))
    doubled = emit.call(operator.mul, boost, 2)
    raised = emit.method("masked_fill", doubled, is_dense, torch.inf)
    graph.write(site.ref(BOOST), emit.call(torch.where, is_caught, raised, boost))
    if searched:
        graph.write(site.ref(PLAN_MASS), mass)
    for slot, node in ((CHECKED_MASS, mass), (CHECKED_ERROR, error), (CAUGHT, caught)):
        graph.write(site.ref(slot), node)
    return dataclasses.replace(routed, counts=counts, indices=indices), is_caught
