from __future__ import annotations

import gc
import threading
import weakref

import torch

from dit_opt.runtime.clock import Clock
from dit_opt.runtime.scheduler_link import (
    SchedulerLink,
    find_link,
    forget_clocks,
    link_scheduler,
    running_grid,
    set_running_grid,
    set_running_link,
)


class Timesteps(list):
    """Counts how often it is read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def test_timesteps_are_read_once_per_list():
    lists = [Timesteps([1000.0, 500.0]), Timesteps([999.0])]
    current = lists[0]
    link = SchedulerLink(lambda: current)
    assert link.timesteps() is link.timesteps()
    assert link.timesteps() == [1000.0, 500.0] and lists[0].reads == 1
    current = lists[1]
    assert link.timesteps() == [999.0] and lists[1].reads == 1
    current = None
    assert link.timesteps() is None


def test_a_step_index_is_that_of_its_thread():
    link, seen = SchedulerLink(lambda: None), []
    link.step_index = Clock().tick(1000.0)
    other = threading.Thread(target=lambda: seen.append(link.step_index))
    other.start()
    other.join()
    assert link.step_index is not None and seen == [None]


def test_every_parameter_of_a_model_finds_its_link():
    model, stranger = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    link = SchedulerLink(lambda: None)
    link_scheduler(model, link)
    assert {find_link(p) for p in model.parameters()} == {link}
    assert find_link(stranger.weight) is None and find_link(None) is None


def test_a_parameter_that_was_put_in_place_of_another_belongs_to_the_model_that_runs():
    linked, running = SchedulerLink(lambda: None), SchedulerLink(lambda: None)
    model = torch.nn.Linear(2, 2)
    link_scheduler(model, linked)
    set_running_link(running)
    try:
        assert find_link(torch.nn.Linear(2, 2).weight) is running
        assert find_link(model.weight) is linked
    finally:
        set_running_link(None)


def test_a_running_grid_is_that_of_its_thread():
    seen = []
    set_running_grid((3, 4, 5))
    try:
        other = threading.Thread(target=lambda: seen.append(running_grid()))
        other.start()
        other.join()
        assert running_grid() == (3, 4, 5) and seen == [None]
    finally:
        set_running_grid(None)


def test_clocks_of_every_live_link_are_forgotten():
    link = SchedulerLink(lambda: None)
    link_scheduler(torch.nn.Linear(2, 2), link)
    link.streams["stream"] = Clock()
    forget_clocks()
    assert link.streams == {}


def test_a_link_lives_no_longer_than_its_model():
    model, link = torch.nn.Linear(2, 2), SchedulerLink(lambda: None)
    link_scheduler(model, link)
    reference = weakref.ref(link)
    del model, link
    gc.collect()
    assert reference() is None
