"""The callable that Dynamo runs, on stand-ins for compiled graphs."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dit_opt.program.modes import Mode
from dit_opt.program.program import ModeInput, PinnedTable
from dit_opt.program.slots import Key, Lives, Reduce, Slot, SlotRef
from dit_opt.runtime.bound import GradientError
from dit_opt.runtime.clock import Clock
from dit_opt.runtime.compiler import Compiled, CompiledPiece
from dit_opt.runtime.scheduler_link import SchedulerLink, link_scheduler
from dit_opt.runtime.slot_store import KEPT_STREAMS
from tests.runtime.variants import (
    DENSITY,
    HEADS,
    PLAN,
    RECALL,
    Variants,
    bind,
    list_entries,
    make_node,
    read,
    run,
    weight,
    write,
)

ALARM = SlotRef(Slot("test.alarm", frozenset({Key.BRANCH, Key.STREAM}), Lives.PROCESS, Reduce.FLAG))


def test_a_run_is_dense_searches_and_reuses():
    variants = Variants()
    bound, w = bind(variants), weight()
    outs = run(bound, w, [1000, 800, 600, 400, 200])
    assert variants.modes == ["dense", "search", "search", "reuse", "search"]
    assert all(len(out) == 1 for out in outs)
    assert variants.plans == [2]


def test_one_variant_that_is_told_searches_and_reuses():
    told, compiled = [], []

    def compile_variant(mode):
        compiled.append(mode)

        def run(weight, timestep, latents, *given):
            if mode is Mode.DENSE:
                return (weight,)
            told.append((bool(given[0]), given[1].tolist()))
            plan = torch.full((1, HEADS), len(told), dtype=torch.int32)
            unknown = plan / 10 if given[0] else torch.full((1, HEADS), torch.nan)
            return weight, plan, unknown, torch.ones(1, HEADS)

        if mode is Mode.DENSE:
            return Compiled(run, 1, (), ())
        flag = ModeInput(Mode.SEARCH, make_node(torch.bool))
        writes = write(PLAN, RECALL, modes=[Mode.SEARCH]) + write(DENSITY)
        return Compiled(run, 1, ((flag, lambda args: []), read(PLAN)), writes)

    variants = SimpleNamespace(compile=compile_variant)
    served = {Mode.REUSE: Mode.SEARCH}
    modes = frozenset({Mode.DENSE, Mode.SEARCH, Mode.REUSE})
    bound = bind(variants, refresh_every=3, modes=modes, served_by=served)
    run(bound, weight(), [1000, 800, 600, 400, 200])
    assert compiled == [Mode.DENSE, Mode.SEARCH]
    # a blank plan before the first search, then the kept one
    given = [(True, 0), (False, 1), (True, 1), (False, 3)]
    assert told == [(search, [[plan] * HEADS]) for search, plan in given]
    (plan,), (density,), (recall,) = (list_entries(bound, r) for r in (PLAN, DENSITY, RECALL))
    assert (density.writes, recall.writes, plan.writes) == (4, 2, 2)
    assert plan.value.tolist() == [[3] * HEADS] and density.value.tolist() == [[4] * HEADS]
    assert recall.value.tolist() == [[pytest.approx(0.4)] * HEADS]


def test_variants_are_compiled_once_and_only_when_needed():
    variants = Variants()
    bound = bind(variants)
    run(bound, weight(), [1000])
    assert variants.compiled == [Mode.DENSE]
    run(bound, weight(), [1000, 900, 800])
    assert variants.compiled == [Mode.DENSE, Mode.SEARCH]


def test_a_graph_is_as_warm_as_its_coldest_variant():
    warmth, variants = {Mode.DENSE: True, Mode.SEARCH: False, Mode.REUSE: True}, Variants()
    compile_variant = variants.compile
    variants.compile = lambda mode: replace(compile_variant(mode), is_warm=warmth[mode])
    bound = bind(variants)
    assert bound.warm is None
    found = [(bound.variant(mode), bound.warm)[1] for mode in warmth]
    assert found == [True, False, False]


def test_statistics_follow_searches_and_reuse():
    variants = Variants()
    bound, w = bind(variants), weight()
    run(bound, w, [1000, 800, 600, 400])
    assert {id(owner) for owner, *_ in bound.store} == {id(w)}
    (density,), (recall,) = (list_entries(bound, ref) for ref in (DENSITY, RECALL))
    assert (density.writes, recall.writes) == (3, 2)
    # searches returned densities 0.01 and 0.02, the second one was used twice
    assert density.value.mean().item() == pytest.approx(0.05)
    assert recall.value.mean().item() == pytest.approx(0.3)


def test_branches_keep_plans_of_their_own():
    variants = Variants()
    bound, w = bind(variants), weight()
    run(bound, w, [1000, 1000, 800, 800, 600, 600, 400, 400])
    assert variants.plans == [3, 4]


def test_two_models_on_one_graph_keep_their_own_steps_and_plans():
    variants = Variants()
    bound, a, b = bind(variants), weight(), weight()
    for t in (1000, 800, 600, 400):
        run(bound, a, [t])
        run(bound, b, [t])
    assert variants.modes == [p for p in ("dense", "search", "search", "reuse") for _ in "ab"]
    assert variants.plans == [3, 4]


def test_threads_keep_their_own_steps():
    variants = Variants()
    bound, w = bind(variants), weight()
    run(bound, w, [1000, 800])
    other = threading.Thread(target=run, args=(bound, w, [1000]))
    other.start()
    other.join()
    run(bound, w, [600])
    assert variants.modes == ["dense", "search", "dense", "search"]


def test_sizes_of_a_dynamic_graph_keep_their_own_steps():
    variants = Variants()
    bound, w = bind(variants), weight()
    for t in (1000, 800):
        for size in (16, 32):
            bound(w, torch.tensor([float(t)]), size)
    assert variants.modes == ["dense", "dense", "search", "search"]


def test_a_new_trajectory_does_not_use_the_plans_of_the_last_one():
    variants = Variants()
    bound, w = bind(variants, dense_steps=3, refresh_every=10), weight()
    for _ in range(2):
        run(bound, w, [1000, 900, 800, 700, 600])
    assert variants.modes == ["dense", "dense", "dense", "search", "reuse"] * 2
    assert variants.plans == [1, 2]


def test_plans_of_a_forgotten_stream_are_not_taken_for_its_own():
    variants = Variants()
    bound, w = bind(variants, dense_steps=3, refresh_every=10), weight()
    for _ in range(2):
        run(bound, w, [1000, 900, 800, 700])
        bound._streams.clear()
    assert variants.modes == ["dense", "dense", "dense", "search"] * 2


def test_a_second_transformer_searches_in_every_trajectory():
    variants, model = Variants(), torch.nn.ParameterList([weight()])
    timesteps = list(range(1000, 0, -100))
    link_scheduler(model, SchedulerLink(lambda: timesteps))
    bound = bind(variants, dense_steps=0, refresh_every=10)
    for _ in range(2):
        run(bound, model[0], [400, 300, 200])
    assert variants.modes == ["search", "reuse", "reuse"] * 2


def test_a_timestep_given_as_an_int_begins_no_stream_of_its_own():
    variants = Variants()
    bound, w = bind(variants), weight()
    for t in (1000, 800, 600, 400):
        bound(w, t, torch.zeros(1))
    assert variants.modes == ["dense", "search", "search", "reuse"]


def test_streams_that_were_not_used_for_long_are_forgotten():
    variants = Variants()
    bound, w = bind(variants, dense_steps=0, refresh_every=10), weight()
    sizes = range(KEPT_STREAMS + 1)
    for size in sizes:
        bound(w, torch.tensor(1000.0), size)
    assert len(list_entries(bound, PLAN)) == KEPT_STREAMS == len(bound._streams[w])
    # those that are used stay
    for size in (1, KEPT_STREAMS + 1, 2, 1):
        bound(w, torch.tensor(900.0 - len(variants.modes) / 10), size)
    assert variants.modes[-4:] == ["reuse", "search", "search", "reuse"]


def test_a_swapped_data_pointer_keeps_the_state():
    variants = Variants()
    bound, w = bind(variants), weight()
    run(bound, w, [1000, 800, 600])
    w.data = torch.ones(2)
    run(bound, w, [400])
    assert variants.modes[-1] == "reuse"


def test_per_token_timesteps_tell_the_step_by_their_largest():
    variants = Variants()
    bound, w = bind(variants), weight()
    for t in (1000.0, 800.0):
        bound(w, torch.tensor([[0.0, t, t]]), torch.zeros(1))
    assert variants.modes == ["dense", "search"]


def test_a_constant_guidance_input_is_not_the_timestep():
    variants = Variants()
    bound, w = bind(variants, timesteps=(2, 1)), weight()
    guidance = torch.tensor([3500.0])
    for t in (1000.0, 800.0, 600.0, 400.0):
        bound(w, torch.tensor([t]), guidance)
    assert variants.modes == ["dense", "search", "search", "reuse"]


def test_short_calls_stay_dense():
    variants = Variants()
    bound = bind(variants, lengths=[(3, 4)], dense_steps=0)
    run(bound, weight(), [1000, 800])
    assert variants.modes == ["dense", "dense"]


def test_each_site_has_its_own_least_length():
    variants = Variants()
    for lengths in ([(20, 26), (27, 80)], [(20, 80), (27, 26)]):
        run(bind(variants, lengths=lengths, dense_steps=0), weight(), [1000])
    assert variants.modes == ["dense", "search"]


def test_without_a_timestep_a_dense_start_means_dense_with_a_warning(caplog):
    variants = Variants()
    bound, w = bind(variants, timesteps=()), weight()
    with caplog.at_level(logging.WARNING):
        run(bound, w, [1000, 800])
    assert variants.modes == ["dense", "dense"]
    assert caplog.text.count("dense_steps=0") == 1


def test_without_a_timestep_and_a_dense_start_every_call_searches():
    variants = Variants()
    bound = bind(variants, timesteps=(), dense_steps=0)
    run(bound, weight(), [1000, 800])
    assert variants.modes == ["search", "search"]


def test_the_step_of_a_link_stands_in_for_a_missing_timestep():
    variants, model = Variants(), torch.nn.Linear(2, 2).requires_grad_(False)
    bound = bind(variants, timesteps=())
    link, clock = SchedulerLink(lambda: None), Clock()
    link_scheduler(model, link)
    for t in (1000, 800):
        link.step_index = clock.tick(t)
        bound(model.weight, torch.zeros(1), torch.zeros(1))
    assert variants.modes == ["dense", "search"]


def test_tables_of_a_device_are_made_before_its_graphs_and_kept():
    variants, made = Variants(), []

    def make(sizes, device):
        made.append((sizes, device.type, len(variants.runs)))

    graph = Graph()
    for name in ("weight", "size"):
        graph.placeholder(name)
    size = ShapeEnv().create_unbacked_symint()
    graph.find_nodes(op="placeholder")[1].meta["example_value"] = size
    pins = [PinnedTable(0, (sympy.Integer(2), 3 * size.node.expr), make)]
    bound = bind(variants, timesteps=(), graph=graph, pins=pins, refresh_every=1)
    w = torch.nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False)
    link, clock = SchedulerLink(lambda: None), Clock()
    link_scheduler(torch.nn.ParameterList([w]), link)
    for t, n in ((1000.0, 7), (800.0, 7), (600.0, 7), (500.0, 8)):
        link.step_index = clock.tick(t)
        bound(w, n)
    assert variants.modes == ["dense", "search", "search", "search"]
    assert made == [([2, 21], "meta", 1), ([2, 24], "meta", 3)]
    assert bound.pin_sizes == {(7,): [[2, 21]], (8,): [[2, 24]]}


def test_a_processor_makes_its_tables_where_they_are_looked_up():
    pins = [PinnedTable(0, (sympy.Integer(2),), lambda sizes, device: pytest.fail("made"))]
    bound = bind(Variants(), pins=pins)
    run(bound, weight(), [1000, 800])
    assert bound.pin_sizes == {(): [[2]]}


def test_forget_begins_anew():
    variants = Variants()
    bound, w = bind(variants), weight()
    run(bound, w, [1000, 800])
    bound.forget()
    run(bound, w, [600])
    assert [entry.writes for entry in list_entries(bound, DENSITY)] == [1]
    assert bound.calls[w][Mode.SEARCH] == 1


def test_gradients_are_refused():
    bound = bind(Variants())
    w = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(GradientError, match="no_grad"):
        run(bound, w, [1000])
    with torch.no_grad():
        run(bound, w, [1000])


class Alarmed(Variants):
    """Searches and checks find what `verdicts` says, call by call."""

    def __init__(self, verdicts):
        super().__init__()
        self.verdicts = iter(verdicts)

    def compile(self, mode):
        if mode not in (Mode.SEARCH, Mode.VERIFY):
            return super().compile(mode)
        inner = super().compile(mode)

        def run(*args):
            return *inner.run(*args), torch.tensor(next(self.verdicts))

        return replace(inner, run=run, writes=inner.writes + write(ALARM))


def test_an_alarm_has_the_next_call_search():
    variants = Alarmed([False, True, False, False])
    bound = bind(variants, dense_steps=0, refresh_every=100, verify_every=2, alarm=ALARM)
    run(bound, weight(), [1000 - 10 * i for i in range(6)])
    # the check in step 2 raises it, so step 3 searches
    assert variants.modes == ["search", "reuse", "verify", "search", "verify", "reuse"]


def test_an_alarm_of_one_branch_or_model_is_no_other_ones():
    variants = Alarmed([False] * 8 + [True] + [False] * 6)
    bound = bind(variants, dense_steps=0, refresh_every=100, verify_every=1, alarm=ALARM)
    a, b = weight(), weight()
    for t in (1000, 990, 980):
        for w in (a, b):
            run(bound, w, [t, t])
    # how many branches there are, the second step tells
    assert variants.modes == ["search"] * 8 + ["verify"] * 4
    run(bound, b, [970])
    run(bound, a, [970, 970])
    assert variants.modes[-3:] == ["verify", "search", "verify"]


def test_values_by_step_are_kept_apart():
    by_step = frozenset(Key)
    ref = SlotRef(Slot("test.difference", by_step, Lives.PROCESS), anchor=0)

    class Comparing(Variants):
        def compile(self, mode):
            inner = super().compile(mode)
            if mode is Mode.DENSE:
                return inner

            def run(*args):
                return *inner.run(*args), torch.full((1, HEADS), len(self.runs) / 4)

            return replace(inner, run=run, writes=inner.writes + write(ref))

    bound, w = bind(Comparing()), weight()
    run(bound, w, [1000, 800, 600, 400])
    steps = {step: e for _, (slot, _), (*_, step), e in bound.store if slot is ref.slot}
    assert {step: e.value.tolist() for step, e in steps.items()} == {
        1: [[0.5] * HEADS],
        2: [[0.75] * HEADS],
        3: [[1.0] * HEADS],
    }


TABLE = Slot("test.table", frozenset({Key.PARAMETER, Key.STEP}), Lives.WEIGHTS)
PROMPT = Slot("test.prompt", frozenset({Key.PARAMETER, Key.BRANCH}))


def make_piece(slot, log, arguments=(1,)):
    """A piece that writes the sum of what it takes to a slot."""

    def run(*args):
        log.append(tuple(float(a) for a in args))
        return (torch.full((1, HEADS), sum(log[-1])),)

    return CompiledPiece(Compiled(run, 0, (), write(SlotRef(slot, anchor=0))), arguments)


class Reading(Variants):
    """Every variant reads what a piece wrote."""

    def __init__(self, slot):
        super().__init__()
        self.given, self.slot = [], slot

    def compile(self, mode):
        def run(*args):
            self.given.append(args[-1].tolist()[0][0])
            return (args[0],)

        return Compiled(run, 1, (read(SlotRef(self.slot, anchor=0), torch.float32),), ())


def test_a_piece_runs_where_its_key_is_new_or_its_weight_has_changed():
    log, variants = [], Reading(TABLE)
    bound = bind(variants, pieces=[make_piece(TABLE, log)], modes=frozenset({Mode.DENSE}))
    w = weight()
    run(bound, w, [1000, 1000, 800])
    # a slot by step is the same for both branches
    assert log == [(1000.0,), (800.0,)] and variants.given == [1000.0, 1000.0, 800.0]
    run(bound, w, [1000, 800])
    assert len(log) == 2 and variants.given[3:] == [1000.0, 800.0]
    with torch.no_grad():
        w.add_(1)
    run(bound, w, [1000])
    assert log[2:] == [(1000.0,)]


def test_a_piece_of_a_run_runs_once_for_each_branch():
    log, variants = [], Reading(PROMPT)
    bound = bind(variants, pieces=[make_piece(PROMPT, log, (2,))], modes=frozenset({Mode.DENSE}))
    w = weight()
    for t in (1000, 800, 600):
        for latents in (5.0, 6.0):
            run(bound, w, [t], torch.tensor(latents))
    # how many branches there are, the second step tells
    assert variants.given == [5.0, 6.0] * 3 and log == [(5.0,), (6.0,)] * 2
    run(bound, w, [1000], torch.tensor(7.0))
    assert variants.given[-1] == 7.0


def test_a_slot_without_a_value_or_a_blank_is_an_error():
    bound = bind(Reading(TABLE), modes=frozenset({Mode.DENSE}))
    with pytest.raises(LookupError, match=r"'test\.table' has no value"):
        run(bound, weight(), [1000])


def test_a_model_without_parameters_has_state_too():
    variants = Variants()

    def compile_variant(mode):
        compiled = variants.compile(mode)
        without = [replace(w, ref=replace(w.ref, anchor=None)) for w in compiled.writes]
        return replace(compiled, writes=tuple(without))

    bound = bind(SimpleNamespace(compile=compile_variant), model=None, refresh_every=1)
    run(bound, torch.zeros(1), [1000, 800, 600])
    assert variants.modes == ["dense", "search", "search"]
    assert [entry.writes for entry in list_entries(bound, DENSITY)] == [2]


def test_a_guidance_that_changes_once_is_not_taken_for_the_timestep():
    variants = Variants()
    bound, w = bind(variants, timesteps=(1, 2), dense_steps=2, refresh_every=10), weight()
    bound(w, torch.tensor(1000.0), torch.tensor(1000.0))
    for _ in range(2):
        for t in (1000.0, 750.0, 500.0, 250.0):
            bound(w, torch.tensor(t), torch.tensor(3500.0))
    assert variants.modes[1:] == ["dense", "dense", "search", "reuse"] * 2


def test_the_schedulers_list_tells_the_timestep_from_a_guidance():
    timesteps = [1000.0, 600.0, 300.0]
    variants, model = Variants(), torch.nn.ParameterList([weight()])
    link_scheduler(model, SchedulerLink(lambda: timesteps))
    bound = bind(variants, timesteps=(1, 2), dense_steps=1, refresh_every=10)
    for t in timesteps:
        # the guidance, which comes first, changes as well
        bound(model[0], torch.tensor(3500.0 - t), torch.tensor(t))
    assert variants.modes == ["dense", "search", "reuse"]


def test_a_run_after_a_warm_up_searches_its_own_plans():
    variants, w = Variants(), weight()
    bound = bind(variants, dense_steps=0, refresh_every=10)
    run(bound, w, [1000])
    run(bound, w, [1000, 750, 500])
    assert variants.modes == ["search", "search", "search", "reuse"]
    run(bound, w, [1000, 750, 500])
    assert variants.modes[4:] == ["search", "reuse", "reuse"]


def test_a_guidance_that_is_in_the_schedulers_list_is_told_by_its_constancy():
    timesteps = [1000.0, 600.0, 300.0]
    variants, model = Variants(), torch.nn.ParameterList([weight()])
    link_scheduler(model, SchedulerLink(lambda: timesteps))
    bound = bind(variants, timesteps=(1, 2), dense_steps=2, refresh_every=10)
    for t in timesteps:
        # 1 is the first timestep, divided by 1000
        bound(model[0], torch.tensor(1.0), torch.tensor(t))
    assert variants.modes == ["dense", "dense", "search"]
