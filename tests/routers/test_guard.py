"""The guard over a run: what a head that is caught may drop, and how long it is remembered."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import dit_opt
from dit_opt.passes.sparse_attention import DENSITY, PLAN_DENSITY
from dit_opt.routers.base import BOOST
from dit_opt.routers.guard import CAUGHT, CHECKED_ERROR, CHECKED_MASS, PLAN_MASS, SLACK
from dit_opt.runtime import compiler
from dit_opt.runtime.registry import live_bounds
from tests.trajectories import compiled

OPS = torch.ops.ditopt
HEADS, MASS = 2, 0.8

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layer(torch.nn.Module):
    """One site with a step; 192 tokens are 2 x 3 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(32, 32).requires_grad_(False)
        self.embed = torch.nn.Linear(2, 32).requires_grad_(False)

    def forward(self, video, timestep):
        angle = timestep[:, None] / 1000
        embedded = self.embed(torch.cat([angle.sin(), angle.cos()], -1))
        x = video.flatten(2).transpose(1, 2) + embedded[:, None]
        q = self.to_q(x).unflatten(2, (HEADS, 16)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return out.transpose(1, 2).unflatten(2, video.shape[2:])


class Run:
    """A run under a guard whose verdicts are given, call by call: 1 for a head that is caught."""

    def __init__(self, monkeypatch, verdicts, batch=1, **options):
        self.boosts: list[list[float]] = []
        self.expected: list[float | None] = []
        verdicts = iter(verdicts)

        def check(q, k, v, counts, indices, bias, scale, expected, *rest):
            caught = torch.tensor(next(verdicts), dtype=torch.float32).expand(batch, HEADS)
            self.expected.append(None if expected is None else float(expected.mean()))
            mass = torch.full((batch, HEADS), MASS)
            return counts, indices, mass, 1 - mass, caught

        def stand_in(gm, inputs, patches):
            """The graph as it is, but for the verdicts of the guard."""
            for node in gm.graph.find_nodes(op="call_function", target=OPS.guard_plan_v1.default):
                node.target = check
            gm.recompile()
            return gm

        monkeypatch.setattr(compiler, "compile_with_inductor", stand_in)
        self.layer = Layer()
        asked = {
            "router": "subblock",
            "density": 0.5,
            "min_tokens": 0,
            "dense_steps": 0,
            "refresh_every": 100,
        }
        self.model = compiled(self.layer, **{**asked, "verify_every": 2, **options})
        self.video = torch.randn(batch, 32, 3, 8, 8)

    def step(self, timesteps):
        with torch.no_grad():
            for t in timesteps:
                self.model(self.video, torch.tensor([float(t)]))
                self.boosts.append(self.find(BOOST).value[0].tolist())
        return self

    def find(self, slot):
        """The one entry of a slot."""
        (entry,) = (e for b in live_bounds() for _, (s, _), _, e in b.store if s is slot)
        return entry

    @property
    def calls(self):
        (bound,) = live_bounds()
        (calls,) = bound.calls.values()
        return {mode.value: count for mode, count in calls.items() if count}


STEPS = [1000 - 10 * i for i in range(6)]


def test_a_head_that_is_caught_is_searched_anew_and_may_drop_less(monkeypatch):
    run = Run(monkeypatch, [[0, 0], [0, 1], [0, 0], [0, 0]]).step(STEPS)
    # the check in step 2 catches a head, so step 3 searches; step 4 checks again
    assert run.calls == {"search": 2, "reuse": 2, "verify": 2}
    assert run.boosts == [[1, 1]] * 2 + [[1, 2]] * 4
    # a check of a plan that lives on expects the mass that it had when it was made
    assert run.expected == [None, pytest.approx(MASS), None, pytest.approx(MASS)]
    assert run.find(PLAN_MASS).writes == 2
    mass, error, caught = (run.find(s) for s in (CHECKED_MASS, CHECKED_ERROR, CAUGHT))
    assert mass.writes == error.writes == caught.writes == 4
    assert caught.value.tolist() == [[0, 1]]
    assert mass.value.mean().item() == pytest.approx(4 * MASS)
    assert error.value.mean().item() == pytest.approx(4 * (1 - MASS))


def test_a_search_by_quality_is_expected_to_reach_it(monkeypatch):
    run = Run(monkeypatch, [[0, 0]] * 2, density=None, quality=0.7).step(STEPS[:3])
    assert run.expected == [pytest.approx(0.7), pytest.approx(MASS)]
    assert 0 < SLACK < 0.1


def test_a_head_that_is_caught_again_and_again_stays_dense(monkeypatch):
    run = Run(monkeypatch, [[1, 0]] * 4).step(STEPS[:4])
    assert run.calls == {"search": 4}
    assert run.boosts == [[2, 1], [4, 1], [math.inf, 1], [math.inf, 1]]


def test_a_search_is_given_the_boost_of_the_catches_before_it(monkeypatch):
    """A head that may drop less is denser in the next plan, and one that may drop nothing dense."""
    run, densities = Run(monkeypatch, itertools.repeat([1, 0])), []
    for t in STEPS[:4]:
        run.step([t])
        densities.append(run.find(PLAN_DENSITY).value[0].tolist())
    caught, other = zip(*densities, strict=True)
    # shares of blocks are summed in float32
    assert list(caught) == sorted(caught) and caught[0] < caught[-1] == pytest.approx(1, abs=1e-6)
    assert len(set(other)) == 1 and other[0] < 1


@pytest.mark.parametrize("batch", [1, 2])
def test_a_head_that_was_caught_counts_as_dense(monkeypatch, batch):
    run = Run(monkeypatch, [[0, 1], [0, 0], [0, 0], [1, 0]], batch)
    plans, total = [], torch.zeros(batch, HEADS)
    for t, caught in zip(STEPS[:5], [[0, 1], [0, 0], [0, 0], [0, 0], [1, 0]], strict=True):
        run.step([t])
        plans.append(run.find(PLAN_DENSITY).value.clone())
        total += torch.where(torch.tensor(caught) > 0, 1.0, plans[-1])
    assert run.calls == {"search": 2, "verify": 2, "reuse": 1}
    torch.testing.assert_close(run.find(DENSITY).value, total)
    # the plan itself is as it was searched
    assert all(torch.equal(plan, plans[1]) for plan in plans[1:])
    assert all((plan < 1).all() for plan in plans)


def test_one_density_for_all_items_is_corrected_for_each(monkeypatch):
    """Lists that follow from shapes are the same for all items; who is caught is not."""
    verdicts = [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    run = Run(monkeypatch, verdicts, batch=2, router="frame_tile", verify_every=100)
    run.step(STEPS[:1])
    (planned,) = set(run.find(PLAN_DENSITY).value.flatten().tolist())
    assert planned < 1
    density = run.find(DENSITY).value
    torch.testing.assert_close(density, torch.tensor([[1.0, planned], [planned, planned]]))


def test_a_new_run_begins_with_ordinary_budgets(monkeypatch):
    verdicts = [[1, 0]] * 3 + [[0, 0]] * 3
    run = Run(monkeypatch, verdicts, refresh_every=1).step([1000, 990, 980])
    address = run.find(BOOST).value.data_ptr()
    run.step([1000, 990, 980])
    assert [boost[0] for boost in run.boosts] == [2, 4, math.inf, 1, 1, 1]
    # what was found is kept, and a CUDA graph knows its inputs by their addresses
    assert run.find(CAUGHT).value.tolist() == [[3, 0]]
    assert run.find(BOOST).value.data_ptr() == address


@pytest.mark.parametrize("router", ["subblock", "headwise", "rainfusion", "frame_tile"])
def test_every_block_is_attended_to_by_a_head_that_is_caught(monkeypatch, router, eager):
    """The guard itself, with a plan that is never good enough, gives dense attention."""
    monkeypatch.setattr("dit_opt.routers.guard.SLACK", -2.0)
    layer, video = Layer(), torch.randn(1, 32, 3, 8, 8)
    asked = {
        "router": router,
        "density": 0.5,
        "min_tokens": 0,
        "dense_steps": 0,
        "refresh_every": 100,
    }
    model = compiled(layer, **asked, verify_every=1)
    # a search for a density promises no mass; the check after it is held to what the search kept
    searched, checked = (model(video, torch.tensor([t])) for t in (1000.0, 990.0))
    torch.testing.assert_close(checked, layer(video, torch.tensor([990.0])), rtol=1e-4, atol=1e-5)
    dense = layer(video, torch.tensor([1000.0]))
    assert router == "rainfusion" or (searched - dense).norm() > 1e-2 * dense.norm()
    (graph,) = dit_opt.report(layer).graphs
    assert graph.calls == {"search": 1, "verify": 1} and graph.layers[0].guard.caught == HEADS
