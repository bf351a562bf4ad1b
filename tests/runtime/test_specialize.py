from __future__ import annotations

import threading

import pytest
import torch

from dit_opt.runtime.handover import tag_outputs
from dit_opt.runtime.scheduler_link import set_running_grid
from dit_opt.runtime.specialize import LayoutHints, LayoutSpecializer, read_hints

WIDE, HIGH = (((1, ((60, (3, 4, 5)),)),), ((1, ((60, (3, 5, 4)),)),))


@pytest.fixture
def running_grid():
    yield set_running_grid
    set_running_grid(None)


def tag(spans):
    tensor = torch.zeros(2, 60)
    tag_outputs([tensor], {0: spans}, None)
    return tensor


def number(t, h, w):
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in (t, h, w)), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 3)


def test_hints_are_what_the_arguments_and_the_running_model_tell(running_grid):
    args = [tag(WIDE), number(3, 4, 5), 7, tag(HIGH)]
    assert not read_hints(args, ())
    # a weight is no input
    assert read_hints(args, (0, 1, 2)) == LayoutHints(spans=((0, WIDE),))
    assert read_hints(args, (), [(1, 0, 0, 60)]) == LayoutHints(id_grids=((3, 4, 5),))
    running_grid((3, 4, 5))
    assert read_hints(args, ()) == LayoutHints(grid=(3, 4, 5))


def test_ids_that_tell_no_grid_are_a_hint_too():
    hints = read_hints([torch.zeros(60, 3)], (0,), [(0, 0, 0, 60)])
    assert hints == LayoutHints(id_grids=(None,)) and hints


def make_specializer(bound, first, hints, **places):
    def bind(other):
        bound.append(other)
        return lambda *args: (other, len(args))

    return LayoutSpecializer(bind, hints, first, places.get("user_inputs", (0,)), ())


def test_a_graph_is_bound_once_for_each_layout():
    bound, wide, high = [], tag(WIDE), tag(HIGH)
    hints = read_hints([wide], (0,))
    call = make_specializer(bound, lambda *args: "first", hints)
    assert [call(x) for x in (wide, wide)] == ["first", "first"] and bound == []
    other = read_hints([high], (0,))
    assert [call(high), call(high), call(wide)] == [(other, 1), (other, 1), "first"]
    # and for what carries no hint
    assert call(torch.zeros(2, 60)) == (LayoutHints(), 1)
    assert bound == [other, LayoutHints()]


def test_threads_that_meet_a_layout_together_bind_it_once():
    bound, started = [], threading.Barrier(4)
    call, high = make_specializer(bound, None, LayoutHints(grid=(1, 1, 1))), tag(HIGH)

    def run():
        started.wait()
        call(high)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bound) == 1
