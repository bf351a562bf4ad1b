from __future__ import annotations

import torch

from dit_opt.demo import clips
from dit_opt.demo.sampler import denoise, to_frames
from tests.demo.stubs import SIZE, StubDenoiser, make_task


def test_denoise_calls_both_guidance_branches_each_step():
    model, task = StubDenoiser(), make_task(steps=4)
    steps = list(task.sample(model))
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert model.calls == 2 * 4
    assert steps[-1].latents.shape == (1, 3, *SIZE)


def test_guidance_extrapolates_from_the_unconditional_branch():
    def model(hidden_states, timestep, encoder_hidden_states, return_dict):
        value = 1.0 if encoder_hidden_states.any() else 0.25
        return (torch.full_like(hidden_states[:, :3], value),)

    prompt = make_task().prompt
    plain, guided = (
        list(denoise(model, prompt, 0, steps=2, guidance=g, size=SIZE))[-1].latents
        for g in (1.0, 3.0)
    )
    # sigma falls from 1 to 0: velocities 1.0 and 0.25 + 3 * 0.75 = 2.5
    torch.testing.assert_close(plain - guided, torch.full_like(plain, 1.5))


def test_the_model_is_told_where_pixels_are():
    seen = []

    def model(hidden_states, timestep, encoder_hidden_states, return_dict):
        seen.append(hidden_states)
        return (hidden_states[:, :3],)

    list(denoise(model, make_task().prompt, 0, steps=2, size=SIZE))
    assert len(seen) == 4
    assert all(torch.equal(x[0, 3:], clips.locate(SIZE)) for x in seen)


def test_to_frames_rounds_and_clamps():
    clip = torch.tensor([-3.0, -1.0, 0.001, 1.0]).view(1, 1, 1, 1, 4).expand(1, 3, 2, 1, 4)
    frames = to_frames(clip)
    assert frames.shape == (2, 1, 4, 3) and frames.dtype == torch.uint8
    assert frames[0, 0, :, 0].tolist() == [0, 0, 128, 255]
