from __future__ import annotations

import gc

import pytest
import torch

from dit_opt.program.modes import Mode
from dit_opt.runtime.clock import Clock
from dit_opt.runtime.registry import live_bounds, register, reset
from dit_opt.runtime.scheduler_link import SchedulerLink, link_scheduler
from tests.runtime.variants import DENSITY, Variants, bind, list_entries, run, weight

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_a_graph_is_live_for_as_long_as_somebody_holds_it():
    bounds = [bind(Variants()) for _ in range(3)]
    for bound in bounds:
        register(bound)
    gc.collect()
    # other tests may have left graphs that Dynamo holds
    assert live_bounds()[-3:] == bounds
    count = len(live_bounds())
    del bound, bounds[1]
    gc.collect()
    assert live_bounds()[-2:] == bounds and len(live_bounds()) == count - 1


def test_a_reset_forgets_all_but_compiled_graphs():
    variants, w, model = Variants(), weight(), torch.nn.Linear(2, 2)
    bound, link = bind(variants), SchedulerLink(lambda: None)
    register(bound)
    link_scheduler(model, link)
    link.streams["stream"] = Clock()
    run(bound, w, [1000, 800])
    reset()
    assert list(bound.store) == [] and w not in bound.calls and not link.streams
    run(bound, w, [600])
    assert [entry.writes for entry in list_entries(bound, DENSITY)] == [1]
    assert variants.compiled == [Mode.DENSE, Mode.SEARCH]
