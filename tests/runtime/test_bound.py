from __future__ import annotations

import dataclasses
import logging
import threading

import pytest
import torch
from dit_opt.runtime.state import KEPT_STREAMS, Announcement, LayerState, announce

from dit_opt.runtime.bound import WITHOUT_STEP, Bound, GradientError, Wiring
from dit_opt.runtime.clock import Clock, Mode, Schedule

LAYOUT = (2, 2, 2, 0, 8)
STATE = {Mode.SEARCH: ("plan", "recall", "density"), Mode.REUSE: ()}
CHECK = ("kept", "error", "caught")
GUARDED = {Mode.SEARCH: (*STATE[Mode.SEARCH], *CHECK), Mode.REUSE: (), Mode.VERIFY: CHECK}


class Graph:
    """Stands in for a compiled graph: arguments are weight, timestep and latents."""

    def __init__(self, heads: int = 3) -> None:
        self.runs: list[tuple[Mode, tuple]] = []
        self.heads = heads

    def compile(self, phase: Mode):
        def run(weight, *rest):
            # plans change in place, at the address that a CUDA graph knows
            kept = tuple(r.clone() if isinstance(r, torch.Tensor) else r for r in rest)
            self.runs.append((phase, kept))
            out = (weight + 1,)
            if phase is not Mode.SEARCH:
                return out
            count = sum(p is Mode.SEARCH for p, _ in self.runs)
            plan = torch.full((1, self.heads), count, dtype=torch.int32)
            return *out, plan, plan / 10, plan / 100

        return run, False

    @property
    def phases(self) -> list[str]:
        return [p.value for p, _ in self.runs]


def bind(graph, timesteps=(1,), phases=frozenset(Mode), dense_steps=1, refresh_every=2, **kwargs):
    wiring = Wiring(
        outputs=1,
        timesteps=timesteps,
        model=0,
        layers=kwargs.pop("layers", (0,)),
        state=kwargs.pop("state", STATE),
        heads=lambda args: [(1, graph.heads)],
        layouts=lambda args: [LAYOUT],
        hold=kwargs.pop("hold", None),
        lengths=kwargs.pop("lengths", lambda args: [8]),
        min_tokens=kwargs.pop("min_tokens", (4,)),
    )
    schedule = Schedule(dense_steps, refresh_every, kwargs.pop("verify_every", 0))
    return Bound(graph.compile, phases, wiring, schedule, None)


def weight():
    return torch.nn.Parameter(torch.zeros(2), requires_grad=False)


def run(bound, w, timesteps, latents=None):
    latents = torch.zeros(1) if latents is None else latents
    return [bound(w, torch.tensor([float(t)]), latents) for t in timesteps]


def test_a_trajectory_observes_searches_and_reuses():
    graph = Graph()
    bound, w = bind(graph), weight()
    outs = run(bound, w, [1000, 800, 600, 400, 200])
    assert graph.phases == ["dense", "search", "search", "reuse", "search"]
    assert all(len(out) == 1 for out in outs)
    (plan,) = graph.runs[3][1][2:]
    assert plan.tolist() == [[2, 2, 2]]


def test_one_variant_that_is_told_searches_and_reuses():
    told = []

    def compile_variant(phase):
        def run(weight, timestep, latents, *given):
            if phase is Mode.DENSE:
                return (weight,)
            told.append((bool(given[0]), given[1].tolist()))
            plan = torch.full((1, 3), len(told), dtype=torch.int32)
            return weight, plan, plan / 10, torch.full((1, 3), 1 if told[-1][0] else torch.nan)

        compiled.append(phase)
        return run, False

    compiled = []
    wiring = bind(Graph())._wiring
    asks = dataclasses.replace(
        wiring,
        state=dict.fromkeys((Mode.SEARCH, Mode.REUSE), STATE[Mode.SEARCH]),
        blank_plan=lambda batch, heads, tokens: (torch.zeros(batch, heads) - tokens,),
    )
    phases = frozenset(Mode) - {Mode.VERIFY}
    bound = Bound(compile_variant, phases, asks, Schedule(1, 3), None)
    w = weight()
    run(bound, w, [1000, 800, 600, 400, 200])
    assert compiled == [Mode.DENSE, Mode.SEARCH]
    # a blank plan of 8 tokens before a search; the kept plan otherwise
    blank = [[-8] * 3]
    assert told == [(True, blank), (False, [[1] * 3]), (True, blank), (False, [[3] * 3])]
    ((_, _, state),) = bound.states
    assert (state.calls, state.searches) == (4, 2)
    assert state.plan[0].tolist() == [[3] * 3] and state.density.tolist() == [[4] * 3]


def test_variants_are_compiled_once_and_only_when_needed():
    graph, compiled = Graph(), []
    bound = bind(graph)
    inner = bound._compile_variant
    bound._compile_variant = lambda phase: (compiled.append(phase), inner(phase))[1]
    run(bound, weight(), [1000])
    assert compiled == [Mode.DENSE]
    run(bound, weight(), [1000, 900, 800])
    assert compiled == [Mode.DENSE, Mode.SEARCH]


def test_statistics_follow_searches_and_reuse():
    graph = Graph()
    bound, w = bind(graph), weight()
    run(bound, w, [1000, 800, 600, 400])
    ((owner, _, state),) = bound.states
    assert owner is w and state.layout == LAYOUT
    assert (state.calls, state.searches) == (3, 2)
    # searches returned densities 0.01 and 0.02, the second one was used twice
    assert state.density.mean().item() == pytest.approx(0.05)
    assert state.recall.mean().item() == pytest.approx(0.3)


def test_branches_keep_plans_of_their_own():
    graph = Graph()
    bound, w = bind(graph), weight()
    run(bound, w, [1000, 1000, 800, 800, 600, 600, 400, 400])
    plans = [rest[2].tolist()[0][0] for phase, rest in graph.runs if phase is Mode.REUSE]
    assert plans == [3, 4]


def test_two_models_on_one_graph_keep_their_own_steps_and_plans():
    graph = Graph()
    bound, a, b = bind(graph), weight(), weight()
    for t in (1000, 800, 600, 400):
        run(bound, a, [t])
        run(bound, b, [t])
    assert graph.phases == [p for p in ("dense", "search", "search", "reuse") for _ in "ab"]
    plans = [rest[2].tolist()[0][0] for phase, rest in graph.runs if phase is Mode.REUSE]
    assert plans == [3, 4]


def test_threads_keep_their_own_steps():
    graph = Graph()
    bound, w = bind(graph), weight()
    run(bound, w, [1000, 800])
    other = threading.Thread(target=run, args=(bound, w, [1000]))
    other.start()
    other.join()
    run(bound, w, [600])
    assert graph.phases == ["dense", "search", "dense", "search"]


def test_sizes_of_a_dynamic_graph_keep_their_own_steps():
    graph = Graph()
    bound, w = bind(graph), weight()
    for t in (1000, 800):
        for size in (16, 32):
            bound(w, torch.tensor([float(t)]), size)
    assert graph.phases == ["dense", "dense", "search", "search"]


def test_a_new_trajectory_does_not_use_the_plans_of_the_last_one():
    graph = Graph()
    bound, w = bind(graph, dense_steps=3, refresh_every=10), weight()
    for _ in range(2):
        run(bound, w, [1000, 900, 800, 700, 600])
    assert graph.phases == ["dense", "dense", "dense", "search", "reuse"] * 2
    plans = [rest[2].tolist()[0][0] for phase, rest in graph.runs if phase is Mode.REUSE]
    assert plans == [1, 2]


def test_plans_of_a_forgotten_stream_are_not_taken_for_its_own():
    graph = Graph()
    bound, w = bind(graph, dense_steps=3, refresh_every=10), weight()
    for _ in range(2):
        run(bound, w, [1000, 900, 800, 700])
        bound._streams.clear()
    assert graph.phases == ["dense", "dense", "dense", "search"] * 2


def test_a_second_transformer_searches_in_every_trajectory():
    graph, model = Graph(), torch.nn.ParameterList([weight()])
    timesteps = list(range(1000, 0, -100))
    announce(model, Announcement(lambda: timesteps))
    bound = bind(graph, dense_steps=0, refresh_every=10)
    for _ in range(2):
        run(bound, model[0], [400, 300, 200])
    assert graph.phases == ["search", "reuse", "reuse"] * 2


def test_a_timestep_given_as_an_int_begins_no_stream_of_its_own():
    graph = Graph()
    bound, w = bind(graph), weight()
    for t in (1000, 800, 600, 400):
        bound(w, t, torch.zeros(1))
    assert graph.phases == ["dense", "search", "search", "reuse"]


def test_streams_that_were_not_used_for_long_are_forgotten():
    graph = Graph()
    bound, w = bind(graph, dense_steps=0, refresh_every=10), weight()
    sizes = range(KEPT_STREAMS + 1)
    for size in sizes:
        bound(w, torch.tensor(1000.0), size)
    assert len(list(bound.states)) == KEPT_STREAMS == len(bound._streams[w])
    # those that are used stay
    for size in (1, KEPT_STREAMS + 1, 2, 1):
        bound(w, torch.tensor(900.0 - len(graph.phases) / 10), size)
    assert graph.phases[-4:] == ["reuse", "search", "search", "reuse"]


def test_a_swapped_data_pointer_keeps_the_state():
    graph = Graph()
    bound, w = bind(graph), weight()
    run(bound, w, [1000, 800, 600])
    w.data = torch.ones(2)
    run(bound, w, [400])
    assert graph.phases[-1] == "reuse"


def test_per_token_timesteps_tell_the_step_by_their_largest():
    graph = Graph()
    bound, w = bind(graph), weight()
    for t in (1000.0, 800.0):
        bound(w, torch.tensor([[0.0, t, t]]), torch.zeros(1))
    assert graph.phases == ["dense", "search"]


def test_a_constant_guidance_input_is_not_the_timestep():
    graph = Graph()
    bound, w = bind(graph, timesteps=(2, 1)), weight()
    guidance = torch.tensor([3500.0])
    for t in (1000.0, 800.0, 600.0, 400.0):
        bound(w, torch.tensor([t]), guidance)
    assert graph.phases == ["dense", "search", "search", "reuse"]


def test_short_calls_stay_dense():
    graph = Graph()
    bound = bind(graph, lengths=lambda args: [3], dense_steps=0)
    run(bound, weight(), [1000, 800])
    assert graph.phases == ["dense", "dense"]


def test_each_site_has_its_own_least_length():
    graph = Graph()
    state = {"layers": (0,), "lengths": lambda args: [20, 27], "min_tokens": (26, 80)}
    run(bind(graph, **state, dense_steps=0), weight(), [1000])
    run(bind(graph, **state | {"min_tokens": (80, 26)}, dense_steps=0), weight(), [1000])
    assert graph.phases == ["dense", "search"]


def test_without_a_timestep_a_dense_start_means_dense_with_a_warning(caplog):
    graph = Graph()
    bound, w = bind(graph, timesteps=()), weight()
    with caplog.at_level(logging.WARNING):
        run(bound, w, [1000, 800])
    assert graph.phases == ["dense", "dense"]
    assert caplog.text.count(WITHOUT_STEP) == 1 and "dense_steps=0" in WITHOUT_STEP
    assert bound.lacks_step


def test_without_a_timestep_and_a_dense_start_every_call_searches():
    graph = Graph()
    bound = bind(graph, timesteps=(), dense_steps=0)
    run(bound, weight(), [1000, 800])
    assert graph.phases == ["search", "search"] and not bound.lacks_step


def test_an_announced_position_stands_in_for_a_missing_timestep():
    from dit_opt.runtime.clock import Clock

    graph, model = Graph(), torch.nn.Linear(2, 2).requires_grad_(False)
    bound = bind(graph, timesteps=())
    announcement, clock = Announcement(lambda: None), Clock()
    announce(model, announcement)
    for t in (1000, 800):
        announcement.position = clock.tick(t)
        bound(model.weight, torch.zeros(1), torch.zeros(1))
    assert graph.phases == ["dense", "search"]


def test_tables_of_a_device_are_made_before_its_graphs_and_kept():
    graph, held = Graph(), []

    def hold(args, device):
        held.append((device.type, len(graph.runs)))
        return args

    bound = bind(graph, hold=hold, dense_steps=1, timesteps=())
    w = torch.nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False)
    announcement = Announcement(lambda: None)
    announce(torch.nn.ParameterList([w]), announcement)
    clock = Clock()
    for t in (1000.0, 800.0, 600.0):
        announcement.position = clock.tick(t)
        bound(w, 7)
    assert graph.phases == ["dense", "search", "search"] and held == [("meta", 1)]


def test_forget_begins_anew():
    graph = Graph()
    bound, w = bind(graph), weight()
    run(bound, w, [1000, 800])
    bound.forget()
    run(bound, w, [600])
    assert list(bound.states) and bound.calls[w][Mode.SEARCH] == 1


def test_gradients_are_refused():
    bound = bind(Graph())
    w = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(GradientError, match="no_grad"):
        run(bound, w, [1000])
    with torch.no_grad():
        run(bound, w, [1000])


def test_scheduler_timesteps_are_read_once_per_list():
    reads = []

    class Timesteps(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    current = Timesteps([1000.0, 500.0])
    announcement = Announcement(lambda: current)
    assert announcement.timesteps() == announcement.timesteps() == [1000.0, 500.0]
    assert len(reads) == 1


class GuardedGraph(Graph):
    """Its checks find what `verdicts` says, call by call: 1 for a head that was caught."""

    def __init__(self, verdicts):
        super().__init__(heads=2)
        self.verdicts = iter(verdicts)

    def compile(self, phase: Mode):
        inner, _ = super().compile(phase)

        def run(*args):
            out = inner(*args)
            if phase not in (Mode.SEARCH, Mode.VERIFY):
                return out
            caught = torch.tensor([next(self.verdicts)], dtype=torch.float32)
            kept = torch.full((1, 2), 0.8)
            return *out, kept, 1 - kept, caught

        return run, False


def run_guarded(verdicts, timesteps, **kwargs):
    graph = GuardedGraph(verdicts)
    phases = frozenset(Mode)
    bound = bind(graph, phases=phases, state=GUARDED, dense_steps=0, verify_every=2, **kwargs)
    w = weight()
    run(bound, w, timesteps)
    ((_, _, state),) = bound.states
    return graph, state


def test_a_head_that_is_caught_is_searched_anew_and_may_drop_less():
    verdicts = [[0, 0], [0, 1], [0, 0], [0, 0]]
    timesteps = [1000 - 10 * i for i in range(6)]
    graph, state = run_guarded(verdicts, timesteps, refresh_every=100)
    # the check in step 2 catches a head, so step 3 searches
    assert graph.phases == ["search", "reuse", "verify", "search", "verify", "reuse"]
    boosts = [r[2].tolist() for p, r in graph.runs if p is Mode.SEARCH]
    assert boosts == [[[1, 1]], [[1, 2]]]
    expected = [r[3] for p, r in graph.runs if p is Mode.VERIFY]
    assert all(torch.equal(e, torch.full((1, 2), 0.8)) for e in expected)
    assert state.guard.checks == 4 and state.guard.caught.tolist() == [[0, 1]]
    assert state.guard.kept.mean().item() == pytest.approx(3.2)


def test_a_head_that_is_caught_again_and_again_stays_dense():
    graph, state = run_guarded([[1, 0]] * 4, [1000, 990, 980, 970], refresh_every=100)
    assert graph.phases == ["search"] * 4
    boosts = [r[2].tolist()[0][0] for _, r in graph.runs]
    assert boosts == [1, 2, 4, float("inf")]
    assert state.boost.tolist() == [[float("inf"), 1]]


def test_a_head_that_was_caught_counts_as_dense():
    verdicts = [[0, 1], [0, 0], [0, 0], [1, 0]]
    timesteps = [1000 - 10 * i for i in range(5)]
    graph, state = run_guarded(verdicts, timesteps, refresh_every=100)
    assert graph.phases == ["search", "search", "verify", "reuse", "verify"]
    # plans of densities 0.01 and 0.02, of which the second lives on
    expected = torch.tensor([[0.01 + 3 * 0.02 + 1, 1 + 4 * 0.02]])
    torch.testing.assert_close(state.density, expected)
    torch.testing.assert_close(state.last_density, torch.full((1, 2), 0.02))


def test_one_density_for_all_items_is_corrected_for_each():
    one = torch.full((1, 2), 0.25)
    state = LayerState((1, 0), LAYOUT, (), one.clone(), one.clone(), one.clone())
    caught = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    state.record_check(caught, caught, caught, searched=True)
    state.record_reuse()
    assert state.density.tolist() == [[1.25, 0.5], [0.5, 0.5]]


def test_a_new_trajectory_begins_with_ordinary_budgets():
    steps = [1000, 990, 980]
    graph, state = run_guarded([[1, 0]] * 3 + [[0, 0]] * 3, steps * 2, refresh_every=1)
    boosts = [r[2].tolist()[0][0] for _, r in graph.runs]
    assert boosts == [1, 2, 4, 1, 1, 1]
    assert state.boost.tolist() == [[1, 1]] and state.guard.caught.tolist() == [[3, 0]]


def test_differences_are_kept_by_step():
    class Comparing(Graph):
        def compile(self, phase):
            inner, _ = super().compile(phase)
            return lambda *args: (*inner(*args), torch.full((1, 3), 0.25)), False

    state = {phase: (*names, "difference") for phase, names in STATE.items()}
    graph = Comparing()
    bound, w = bind(graph, state=state, phases=frozenset({Mode.DENSE, *STATE})), weight()
    run(bound, w, [1000, 800, 600, 400])
    ((_, _, kept),) = bound.states
    assert sorted(kept.differences) == [1, 2, 3]
    assert kept.differences[2].tolist() == [[0.25] * 3]


def test_a_guidance_that_changes_once_is_not_taken_for_the_timestep():
    graph = Graph()
    bound, w = bind(graph, timesteps=(1, 2), dense_steps=2, refresh_every=10), weight()
    bound(w, torch.tensor(1000.0), torch.tensor(1000.0))
    for _ in range(2):
        for t in (1000.0, 750.0, 500.0, 250.0):
            bound(w, torch.tensor(t), torch.tensor(3500.0))
    assert graph.phases[1:] == ["dense", "dense", "search", "reuse"] * 2


def test_the_schedulers_list_tells_the_timestep_from_a_guidance():
    timesteps = [1000.0, 600.0, 300.0]
    graph, model = Graph(), torch.nn.ParameterList([weight()])
    announce(model, Announcement(lambda: timesteps))
    bound = bind(graph, timesteps=(1, 2), dense_steps=1, refresh_every=10)
    for t in timesteps:
        # the guidance, which comes first, changes as well
        bound(model[0], torch.tensor(3500.0 - t), torch.tensor(t))
    assert graph.phases == ["dense", "search", "reuse"]


def test_a_run_after_a_warm_up_searches_its_own_plans():
    graph, w = Graph(), weight()
    bound = bind(graph, dense_steps=0, refresh_every=10)
    run(bound, w, [1000])
    run(bound, w, [1000, 750, 500])
    assert graph.phases == ["search", "search", "search", "reuse"]
    run(bound, w, [1000, 750, 500])
    assert graph.phases[4:] == ["search", "reuse", "reuse"]


def test_a_guidance_that_is_in_the_schedulers_list_is_told_by_its_constancy():
    timesteps = [1000.0, 600.0, 300.0]
    graph, model = Graph(), torch.nn.ParameterList([weight()])
    announce(model, Announcement(lambda: timesteps))
    bound = bind(graph, timesteps=(1, 2), dense_steps=2, refresh_every=10)
    for t in timesteps:
        # 1 is the first timestep, divided by 1000
        bound(model[0], torch.tensor(1.0), torch.tensor(t))
    assert graph.phases == ["dense", "dense", "search"]
