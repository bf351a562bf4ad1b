from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch

from dit_opt.demo.sampler import Step
from dit_opt.demo.side_by_side import (
    Run,
    Task,
    measure_attention_share,
    run_interleaved,
    run_steps,
)
from dit_opt.options import Options
from tests.demo.stubs import StubDenoiser, ignore, make_contestants, make_task


def test_interleaved_runs_take_turns_and_swap_who_goes_first(monkeypatch):
    order = []

    def sample(self, model):
        for i in range(self.steps):
            order.append(model)
            yield Step(i, 1.0, torch.zeros(1))

    monkeypatch.setattr(Task, "sample", sample)
    run_interleaved({"a": "a", "b": "b"}, make_task(steps=4), ignore)
    assert "".join(order) == "abbaabba"


def test_interleaving_changes_no_clip():
    task = make_task(steps=3)
    models = {"a": StubDenoiser(1.0), "b": StubDenoiser(0.5)}
    told = []
    runs = run_interleaved(models, task, lambda *args: told.append(args))
    for name, model in models.items():
        alone = run_steps(name, model, task, 3, ignore)
        assert torch.equal(runs[name].latents, alone.latents)
        assert len(runs[name].seconds) == 3
    assert not torch.equal(runs["a"].latents, runs["b"].latents)
    assert told == [("a / b", i, 3) for i in range(4)]


def test_run_steps_stops_early():
    model = StubDenoiser()
    run = run_steps("x", model, make_task(steps=5), 2, ignore)
    assert len(run.seconds) == 2
    assert model.calls == 4


def test_summary_of_seconds():
    run = Run((4.0, 1.0, 2.0, 3.0, 5.0), torch.zeros(1))
    assert run.total == 15
    assert run.summarise() == {"mean": 3, "median": statistics.median(run.seconds), "iqr": 2}
    assert Run((4.0,), torch.zeros(1)).summarise() == {"mean": 4, "median": 4, "iqr": 0}


def test_attention_share_counts_attention_only():
    class Slow(StubDenoiser):
        def forward(self, *args, **kwargs):
            torch.randn(300, 300) @ torch.randn(300, 300)
            return super().forward(*args, **kwargs)

    assert 0 < measure_attention_share(Slow(), make_task(steps=2)) < 1

    def model(hidden_states, **kwargs):
        return (hidden_states[:, :3],)

    assert measure_attention_share(model, make_task(steps=2)) == 0


@pytest.mark.parametrize(("asked", "dense"), [(0, 0), (3, 3), (99, 20), (0.2, 7), (1.0, 20)])
def test_dense_steps_follow_the_options(asked, dense):
    contestants = dataclasses.replace(make_contestants(), options=Options(dense_steps=asked))
    assert contestants.dense_steps(20) == dense


@pytest.mark.parametrize(
    ("options", "cold"),
    [
        # two after the seven dense ones: the noise level of the seventh is above 0.8
        ({}, 9),
        ({"dense_steps": 0}, 2),
        ({"dense_steps": 3}, 5),
        ({"dense_steps": 1.0}, 20),
        # the check comes at step 5
        ({"verify_every": 5, "dense_steps": 0}, 6),
        ({"verify_every": 4, "dense_steps": 4}, 9),
        # each check falls on a search
        ({"verify_every": 5, "refresh_every": 5, "dense_steps": 0}, 2),
        # the search at step 3 has another one after it
        ({"dense_steps": 3, "refresh_every": 2}, 6),
        ({"verify_every": 19}, 20),
    ],
)
def test_cold_steps_meet_every_variant(options, cold):
    contestants = dataclasses.replace(make_contestants(), options=Options(**options))
    assert contestants.cold_steps(20) == cold
    assert contestants.cold_steps(1) == 1
