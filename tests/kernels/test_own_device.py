"""Launchers run on the device of their tensors."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.own_device import on_own_device


def test_arguments_and_results_pass_through():
    @on_own_device
    def add(x, y, *, factor=1):
        """Documented."""
        return (x + y) * factor

    assert torch.equal(add(torch.ones(2), 1, factor=3), torch.full((2,), 6.0))
    assert (add.__name__, add.__doc__) == ("add", "Documented.")


def test_the_first_tensor_names_the_device(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, tensor):
            entered.append(tensor)

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *error):
            entered.append("out")

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    x = torch.ones(1)

    @on_own_device
    def fail(x):
        entered.append("runs")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail(x)
    assert entered[0] is x and entered[1:] == ["in", "runs", "out"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one_is_used():
    x = torch.ones(1, device="cuda:1")
    assert on_own_device(lambda x: torch.cuda.current_device())(x) == 1
    assert torch.cuda.current_device() == 0
