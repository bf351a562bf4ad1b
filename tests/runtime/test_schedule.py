from __future__ import annotations

import pytest

from dit_opt.runtime.schedule import Clock, Phase, Schedule, choose_phase, is_dense


def positions(calls, timesteps=None):
    clock = Clock()
    return [clock.tick(t, timesteps) for t in calls]


def places(timesteps):
    seen = positions(timesteps)
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
    levels = [p.level for p in positions([scale, 0.5 * scale, 0.1 * scale])]
    assert levels == pytest.approx([1.0, 0.5, 0.1])


def test_the_last_timesteps_of_a_thousand_scale_stay_on_that_scale():
    first, *_, last = positions([1000, 400, 1.0, 0.5])
    assert last.run == first.run and last.step == 3
    assert last.level == pytest.approx(0.0005)


def test_a_change_of_convention_begins_a_trajectory():
    assert places([1.0, 0.5, 990.0]) == [(0, 0, 0), (0, 1, 0), (1, 0, 0)]


def test_rising_timesteps_count_from_noise_at_zero():
    seen = positions([0.0, 0.25, 0.75, 0.0, 0.25])
    assert [p.level for p in seen] == pytest.approx([1.0, 0.75, 0.25, 1.0, 0.75])
    assert is_dense(seen[0], 1) and not is_dense(seen[1], 1)
    runs = [(p.run - seen[0].run, p.step) for p in seen]
    assert runs == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_second_transformer_is_not_at_the_start():
    first = positions([875.0, 800.0])[0]
    assert first.step == 0 and not first.from_start
    assert not is_dense(first, 5)
    assert not is_dense(first, 0.1)


def test_the_scheduler_gives_a_second_transformer_its_step():
    timesteps = [1000.0, 950.0, 875.0, 600.0]
    first = positions([875.0], timesteps=timesteps)[0]
    assert (first.step, first.total, first.from_start) == (2, 4, True)
    assert is_dense(first, 3) and not is_dense(first, 2)


def test_scheduler_timesteps_match_models_that_divide_by_a_thousand():
    seen = positions([1.0, 0.5], timesteps=[1000.0, 500.0])
    assert [p.step for p in seen] == [0, 1]
    assert seen[0].total == 2


@pytest.mark.parametrize("dense_steps, dense", [(0, 0), (2, 2), (0.3, 3), (1.0, 10)])
def test_dense_start_with_a_known_length(dense_steps, dense):
    timesteps = [1000.0 - 100 * i for i in range(10)]
    seen = positions(timesteps, timesteps=timesteps)
    assert [is_dense(p, dense_steps) for p in seen] == [i < dense for i in range(10)]


def test_a_share_of_an_unknown_length_is_a_share_of_the_noise_range():
    shift = 5.0
    sigmas = [1 - i / 10 for i in range(10)]
    shifted = [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]
    dense = [is_dense(p, 0.1) for p in positions(shifted)]
    assert dense[0] and sum(dense) >= 1
    assert dense == sorted(dense, reverse=True)


def test_phases_of_a_run_that_refreshes_every_second_step():
    clock, phases = Clock(), []
    for t in (1000, 800, 600, 400, 200):
        position = clock.tick(t)
        has_plan = Phase.SEARCH in phases
        phases.append(choose_phase(position, Schedule(1, 2), has_plan))
    assert [p.value for p in phases] == ["observe", "search", "search", "reuse", "search"]


def test_without_a_position_plans_are_searched_every_time():
    assert choose_phase(None, Schedule(0, 4), True) is Phase.SEARCH


def test_the_guard_checks_between_searches_and_sends_back_to_one():
    clock, phases = Clock(), []
    for i in range(12):
        position = clock.tick(1000 - 50 * i)
        caught = i == 9
        phases.append(choose_phase(position, Schedule(1, 6, 2), i > 1, caught))
    assert [p.value for p in phases] == [
        "observe", "search", "verify", "reuse", "verify", "reuse", "search", "reuse", "verify",
        "search", "verify", "reuse",
    ]  # fmt: skip
