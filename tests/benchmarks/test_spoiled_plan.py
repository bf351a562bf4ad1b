from __future__ import annotations

import pytest
import torch

import dit_opt
from benchmarks import spoiled_plan
from benchmarks.spoiled_plan import Outcome, summarise
from dit_opt.routers.headwise import WORDS
from tests.trajectories import big_wan, compiled, run_trajectory

pytestmark = pytest.mark.usefixtures("eager")


def test_lists_are_dealt_out_anew_and_stay_lists():
    tiny = big_wan()
    for block in tiny.model.blocks:
        # A peaked softmax, or every list keeps as much.
        block.attn1.norm_q.weight.data *= 8
    asked = {"router": "headwise", "density": 0.4, "min_tokens": 0, "dense_steps": 0}
    model = compiled(tiny.model, **asked, verify_every=1)
    run_trajectory(model, tiny.inputs, [999.0])
    plans = spoiled_plan.list_values(WORDS)
    before = [words.clone() for words in plans]
    assert spoiled_plan.spoil_plans() == len(plans) == 2
    for dealt, words in zip(plans, before, strict=True):
        assert torch.equal(dealt.sort(2).values, words.sort(2).values)
        assert not torch.equal(dealt, words)
    assert spoiled_plan.count_caught() == 0
    run_trajectory(model, tiny.inputs, [750.0])
    assert spoiled_plan.count_caught() > 0
    assert dit_opt.report(tiny.model).graphs[0].calls["verify"] == 1


def test_the_catch_is_counted_from_the_spoiled_step_on():
    whole = Outcome(32.0, [0, 0, 1, 0, 0, 0])
    outcomes = {
        "not spoiled": whole,
        "spoiled, guarded": Outcome(31.5, [0, 0, 1, 0, 7, 0]),
        "spoiled, no guard": Outcome(20.0, [0] * 6),
    }
    found = summarise(outcomes, 3)
    assert found["caught_after_steps"] == 2 and found["psnr_lost_db"] == pytest.approx(0.5)
    assert "caught after 2 steps" in spoiled_plan.render(found)
    assert summarise({**outcomes, "spoiled, guarded": whole}, 3)["caught_after_steps"] is None
