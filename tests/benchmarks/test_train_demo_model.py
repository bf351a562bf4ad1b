from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import train_demo_model as trainer
from dit_opt.demo import clips
from dit_opt.demo.model import load_model


def test_the_schedule_walks_through_the_phases_and_ends_at_rest():
    shares = [phase.share for phase in trainer.PHASES]
    assert sum(shares) == pytest.approx(1)
    ends = [sum(shares[: i + 1]) for i in range(len(shares))]
    rates = [trainer.choose_rate(e - d, 1000) for e in ends for d in (0.001, -0.001)]
    assert [which for which, _ in rates] == [0, 1, 1, 2, 2, 2]
    assert trainer.choose_rate(0.0, 1000) == (0, pytest.approx(trainer.PHASES[0].rate))
    assert rates[0][1] == pytest.approx(trainer.PHASES[0].rate / 2, rel=0.05)
    assert rates[1][1] == pytest.approx(trainer.PHASES[1].rate, rel=0.05)
    assert rates[4][1] < 2e-5
    assert trainer.choose_rate(0.0, 0)[1] < trainer.PHASES[0].rate / 25


def test_attention_starts_local_along_the_axes_of_each_head():
    model = trainer.build_model()
    attn, rope = model.blocks[0].attn1, model.rope
    bias = attn.to_q.bias.view(4, 64)
    t, h, w = 8, 8, 8
    cos, sin = rope(torch.zeros(1, 3, t, 4 * h, 4 * w))
    cos, sin = (x[0, :, 0].view(t, h, w, 64) for x in (cos, sin))

    def score(head, a, b):
        rotated = []
        for place in (a, b):
            x1, x2 = bias[head, 0::2], bias[head, 1::2]
            c, s = cos[place][0::2], sin[place][1::2]
            rotated.append(torch.stack([x1 * c - x2 * s, x1 * s + x2 * c]))
        return float((rotated[0] * rotated[1]).sum().detach() / 8)

    origin, later, aside = (0, 0, 0), (3, 0, 0), (0, 3, 0)
    # head 0 looks along time, head 2 across space
    assert score(0, origin, later) == pytest.approx(score(0, origin, origin), abs=1e-3)
    assert score(0, origin, aside) < score(0, origin, origin) - 4
    assert score(2, origin, later) < score(2, origin, aside) < score(2, origin, origin)


def test_noise_levels_are_stratified_in_the_open_interval():
    shift = 5.0
    sigma = trainer.sample_noise_level(8, shift, torch.Generator().manual_seed(0))
    assert 0 < sigma.min() and sigma.max() < 1
    even = sigma / (shift - (shift - 1) * sigma)
    assert (even.sort().values * 8).long().tolist() == list(range(8))


def test_crops_know_their_place():
    rng = torch.Generator().manual_seed(0)
    clip = clips.locate()[:3].expand(5, -1, -1, -1, -1)
    crops, places = trainer.draw_crops(clip, (8, 32, 16), rng)
    assert crops.shape == (5, 3, 8, 32, 16) and places.shape[1] == clips.PLACE_CHANNELS
    assert torch.equal(crops, places[:, :3])
    # cut between patches, elsewhere each time
    corners = (crops[:, 1, 0, 0, 0] * 32 + 31.5).round().int()
    assert (corners % 4 == 0).all() and len(corners.unique()) > 1
    whole, _ = trainer.draw_crops(clip, (16, 64, 64), rng)
    assert torch.equal(whole, clip)


def test_two_steps_leave_a_checkpoint_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "PHASES", (trainer.Phase((8, 16, 16), 2, 1.0, 1e-3, 3.0),))
    arguments = argparse.Namespace(
        out=tmp_path,
        minutes=5,
        start=None,
        skip_minutes=0,
        resume=False,
        steps=2,
        log_every=1,
        no_compile=True,
    )
    trainer.train(arguments)
    model = load_model(tmp_path / "model.safetensors")
    assert model.proj_out.weight.abs().max() > 0
    arguments.resume, arguments.steps = True, 3
    trainer.train(arguments)
    assert '"step": 3' in (tmp_path / "progress.json").read_text()
