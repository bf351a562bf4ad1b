"""Fixtures for everything that goes through `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from dit_opt.runtime import compiler

# How long an example takes says more of who else uses the machine than of the code.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before or after a test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def eager(monkeypatch, fresh_dynamo):
    """Runs the rewritten graphs as they are: the state is real, nothing is compiled."""
    monkeypatch.setattr(compiler, "compile_with_inductor", lambda gm, inputs, patches: gm)
