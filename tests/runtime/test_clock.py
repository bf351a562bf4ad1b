from __future__ import annotations

import pytest
import torch

from dit_opt.program.modes import Mode, Schedule
from dit_opt.runtime.clock import Clock, choose_mode, is_dense


def indices(calls, timesteps=None):
    clock = Clock()
    return [clock.tick(t, timesteps) for t in calls]


def places(timesteps):
    seen = indices(timesteps)
    return [(p.run - seen[0].run, p.step, p.branch) for p in seen]


def test_batched_branches_are_one_call_a_step():
    assert places([1000, 750, 500, 250]) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]


def test_two_calls_a_step_are_two_branches():
    assert places([1000, 1000, 500, 500]) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]


def test_a_jump_back_begins_a_trajectory():
    assert places([1000, 500, 1000, 500])[2:] == [(1, 0, 0), (1, 1, 0)]


def test_no_two_clocks_share_a_run_but_one_may_take_over_from_another():
    first, second = Clock(), Clock()
    assert first.tick(1000).run != second.tick(1000).run
    heir = Clock(first.run)
    assert heir.tick(1000).run == heir.tick(500).run == first.run
    assert heir.tick(1000).run not in (first.run, second.run)


def test_an_interrupted_trajectory_does_not_leak_into_the_next():
    assert places([999, 999, 800, 999, 999, 800, 800])[3:] == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 0),
        (1, 1, 1),
    ]


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_noise_level_in_both_conventions(scale):
    levels = [p.level for p in indices([scale, 0.5 * scale, 0.1 * scale])]
    assert levels == pytest.approx([1.0, 0.5, 0.1])


def test_the_last_timesteps_of_a_thousand_scale_stay_on_that_scale():
    first, *_, last = indices([1000, 400, 1.0, 0.5])
    assert last.run == first.run and last.step == 3
    assert last.level == pytest.approx(0.0005)


def test_a_change_of_convention_begins_a_trajectory():
    assert places([1.0, 0.5, 990.0]) == [(0, 0, 0), (0, 1, 0), (1, 0, 0)]


def test_rising_timesteps_count_from_noise_at_zero():
    seen = indices([0.0, 0.25, 0.75, 0.0, 0.25])
    assert [p.level for p in seen] == pytest.approx([1.0, 0.75, 0.25, 1.0, 0.75])
    assert is_dense(seen[0], 1) and not is_dense(seen[1], 1)
    runs = [(p.run - seen[0].run, p.step) for p in seen]
    assert runs == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_second_transformer_is_not_at_the_start():
    first = indices([875.0, 800.0])[0]
    assert first.step == 0 and not first.from_start
    assert not is_dense(first, 5)
    assert not is_dense(first, 0.1)


def test_the_scheduler_gives_a_second_transformer_its_step():
    timesteps = [1000.0, 950.0, 875.0, 600.0]
    first = indices([875.0], timesteps=timesteps)[0]
    assert (first.step, first.total, first.from_start) == (2, 4, True)
    assert is_dense(first, 3) and not is_dense(first, 2)


def test_scheduler_timesteps_match_models_that_divide_by_a_thousand():
    seen = indices([1.0, 0.5], timesteps=[1000.0, 500.0])
    assert [p.step for p in seen] == [0, 1]
    assert seen[0].total == 2


@pytest.mark.parametrize("dense_steps, dense", [(0, 0), (2, 2), (0.0, 0), (0.3, 3), (1.0, 10)])
def test_dense_start_with_a_known_length(dense_steps, dense):
    timesteps = [1000.0 - 100 * i for i in range(10)]
    seen = indices(timesteps, timesteps=timesteps)
    assert [is_dense(p, dense_steps) for p in seen] == [i < dense for i in range(10)]


@pytest.mark.parametrize(("steps", "dense"), [(1, 1), (2, 1), (4, 1), (8, 2)])
def test_a_share_is_one_step_of_a_short_run_at_least(steps, dense):
    timesteps = [1000.0 - 1000 / steps * i for i in range(steps)]
    seen = indices(timesteps, timesteps=timesteps)
    assert [is_dense(p, 0.2) for p in seen] == [i < dense for i in range(steps)]


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_share_is_one_of_the_noise_range_whether_the_steps_are_listed_or_not(is_listed):
    timesteps = shift_steps(28, 3.0)
    seen = indices(timesteps, timesteps=timesteps if is_listed else None)
    dense = [is_dense(p, 0.2) for p in seen]
    assert dense == [t > 800 for t in timesteps] and sum(dense) == 12


def test_a_share_of_the_noise_range_holds_at_least_one_step():
    shift = 5.0
    sigmas = [1 - i / 10 for i in range(10)]
    shifted = [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]
    dense = [is_dense(p, 0.1) for p in indices(shifted)]
    assert dense[0] and sum(dense) >= 1
    assert dense == sorted(dense, reverse=True)


def test_modes_of_a_run_that_refreshes_every_second_step():
    clock, modes = Clock(), []
    for t in (1000, 800, 600, 400, 200):
        index = clock.tick(t)
        has_plan = Mode.SEARCH in modes
        modes.append(choose_mode(index, Schedule(1, 2), has_plan))
    assert [p.value for p in modes] == ["dense", "search", "search", "reuse", "search"]


def test_without_an_index_plans_are_searched_every_time():
    assert choose_mode(None, Schedule(0, 4), True) is Mode.SEARCH


def test_the_guard_checks_between_searches_and_sends_back_to_one():
    clock, modes = Clock(), []
    for i in range(12):
        index = clock.tick(1000 - 50 * i)
        caught = i == 9
        modes.append(choose_mode(index, Schedule(1, 6, 2), i > 1, caught))
    assert [p.value for p in modes] == [
        "dense", "search", "verify", "reuse", "verify", "reuse", "search", "reuse", "verify",
        "search", "verify", "reuse",
    ]  # fmt: skip


def plans(calls, timesteps=None):
    """For each call: its branch, and the calls before it whose plans it may use."""
    seen, found = indices(calls, timesteps), []
    for number, index in enumerate(seen):
        mine = (index.epoch, index.branch)
        earlier = [i for i, p in enumerate(seen[:number]) if (p.epoch, p.branch) == mine]
        found.append((index.branch, earlier))
    return found


def test_a_warm_up_call_leaves_no_plan_to_the_run_after_it():
    assert plans([999, 999, 900, 800]) == [(0, []), (1, []), (0, []), (0, [2])]
    # the same with two calls a step, after one and after two calls of another clip
    assert [made for _, made in plans([999, 999, 999, 900, 900, 800])][3:] == [[], [], [3]]
    assert [made for _, made in plans([999] * 4 + [900, 900])][4:] == [[], []]


def test_branches_that_an_earlier_run_had_are_no_strangers():
    run = [1000, 1000, 500, 500, 250, 250]
    assert [made for _, made in plans(run * 2)][6:] == [[], [], [6], [7], [6, 8], [7, 9]]
    # but a third call in the first step is
    assert [made for _, made in plans([*run, 1000, *run])][9:] == [[], [], [9], [10]]


def test_a_new_list_of_the_scheduler_is_a_new_run():
    clock, timesteps = Clock(), [1000.0, 500.0]
    warm_up = clock.tick(1000.0, timesteps)
    first, second = (clock.tick(t, later) for later in [list(timesteps)] for t in timesteps)
    assert warm_up.run != first.run == second.run
    assert (first.branch, second.branch, second.epoch) == (0, 0, first.epoch)


def test_a_model_of_one_step_has_no_end_of_branches():
    assert [branch for branch, _ in plans([1000] * 6)] == [0, 1, 2, 3, 0, 1]
    assert len({p.run for p in indices([1000] * 6)}) == 2


@pytest.mark.parametrize("timesteps", [None, [1000.0, 500.0, 250.0]])
def test_more_windows_than_branches_never_get_each_others_plans(timesteps):
    clock = Clock()
    seen = [clock.tick(t, timesteps) for t in (1000.0, 500.0, 250.0) for _ in range(6)]
    window_of = {}
    for call, index in enumerate(seen):
        assert window_of.setdefault((index.epoch, index.branch), call % 6) == call % 6
    # once a step was seen to its end, plans serve
    assert {p.epoch for p in seen[6:]} == {seen[-1].epoch}


def test_a_jump_to_where_a_rising_model_starts_is_a_new_run():
    assert [made for _, made in plans([0.5, 0.0, 0.1, 0.2])] == [[], [], [1], [1, 2]]
    assert [is_dense(p, 2) for p in indices([0.5, 0.0, 0.1, 0.2])][1:] == [True, True, False]


def test_as_many_windows_in_a_step_as_the_last_run_had_are_one_step():
    calls = [t for t in (1000, 500, 250) for _ in range(6)]
    assert [branch for branch, _ in plans(calls * 2)][18:] == [*range(6)] * 3


def test_the_second_timestep_tells_the_direction():
    assert places([40, 30, 20, 10]) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]
    assert not is_dense(indices([40, 30])[1], 2)
    seen = indices([0.1, 0.3, 0.6, 0.9])
    assert [p.step for p in seen] == [0, 1, 2, 3]
    assert seen[-1].level == pytest.approx(0.1)
    # from clean to pure noise is a jump back
    assert places([500, 999, 800]) == [(0, 0, 0), (1, 0, 0), (1, 1, 0)]


def shift_steps(count, shift):
    sigmas = [1 - i / count for i in range(count)]
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]


@pytest.mark.parametrize("divided", [False, True])
def test_rounded_timesteps_are_found_in_the_schedulers_list(divided):
    timesteps = shift_steps(28, 3.0)
    given = torch.tensor(timesteps, dtype=torch.bfloat16)
    given = (given / 1000 if divided else given).tolist()
    clock, eps = Clock(), torch.finfo(torch.bfloat16).eps
    seen = [clock.tick(t, timesteps, eps) for t in given]
    assert [p.step for p in seen] == list(range(28))
    assert {p.total for p in seen} == {28}


def test_the_nearest_of_the_schedulers_timesteps_counts():
    timesteps = shift_steps(100, 12.0)
    assert [p.step for p in indices(timesteps, timesteps)] == list(range(100))
    # steps that a model skips are not counted twice
    assert [p.step for p in indices(timesteps[::3], timesteps)] == list(range(0, 100, 3))


def test_a_timestep_off_the_list_is_the_next_step_of_its_run():
    timesteps = [1000.0, 750.0, 500.0, 250.0]
    seen = indices([1000.0, 751.0, 480.0, 250.0], timesteps)
    assert [(p.step, p.total) for p in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("warm_up", [0, 0.5, 1, 40, 500])
def test_a_jump_to_pure_noise_is_a_new_run(warm_up):
    assert [made for _, made in plans([warm_up, 999, 900])] == [[], [], [1]]


@pytest.mark.parametrize("calls", [[500, 800, 700], [0.1, 0.3, 0.6], [40, 30, 20]])
def test_plans_from_before_the_direction_was_known_are_given_up(calls):
    """The first call may have been of another clip."""
    assert plans(calls)[1] == (0, [])
