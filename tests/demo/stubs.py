"""A denoiser of one number in place of the demo model, so that tests sample in no time."""

from __future__ import annotations

import torch

from dit_opt.demo.clips import parse_prompt
from dit_opt.demo.side_by_side import Contestants, Pipeline, Task
from dit_opt.options import Options

SIZE = (3, 16, 24)


class StubDenoiser(torch.nn.Module):
    """Pulls every clip towards grey; `strength` tells instances apart."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(strength), requires_grad=False)
        self.calls = 0

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.calls += 1
        tokens = hidden_states.flatten(2)
        torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        # colours go in with their places, and come out alone
        return (hidden_states[:, :3] * self.strength,)


def make_contestants(ditopt_strength: float = 1.0) -> Contestants:
    eager, inductor = StubDenoiser(), StubDenoiser()
    return Contestants(eager, inductor, Pipeline(StubDenoiser(ditopt_strength), None), Options())


def refuse_options(model: torch.nn.Module, error: Exception) -> torch.nn.Module:
    """The model with a backend that raises `error` when it compiles."""

    def backend(gm, inputs):
        raise error

    return torch.compile(model, backend=backend)


def make_task(steps: int = 3, seed: int = 0) -> Task:
    prompt = parse_prompt("a red disk moving left and a blue ring moving up")
    return Task(prompt, seed=seed, steps=steps, size=SIZE)


def ignore(name: str, done: int, steps: int) -> None:
    """A Notify that tells nobody."""
