from __future__ import annotations

import pytest
import torch

from benchmarks import compile_time


def test_ratios_are_those_of_the_medians():
    seconds = {
        "inductor whole": [10.0, 12.0, 90.0],
        "inductor regional": [5.0, 4.0, 6.0],
        "ditopt whole": [18.0, 18.0, 18.0],
        "ditopt regional": [6.0, 7.0, 1.0],
    }
    whole = torch.tensor([3.0, 4.0])
    outputs = {"ditopt whole": whole, "ditopt regional": whole + torch.tensor([0.0, 0.5])}
    found = compile_time.summarise(seconds, outputs)
    assert found["regional_vs_inductor"] == pytest.approx(6 / 5)
    assert found["whole_vs_inductor"] == pytest.approx(18 / 12)
    assert found["regional_vs_whole_error"] == pytest.approx(0.1)
    assert "ditopt regional" in compile_time.render(found)


@pytest.mark.parametrize("contestant", compile_time.CONTESTANTS)
def test_each_contestant_is_set_up_as_its_name_says(contestant, monkeypatch):
    calls = []

    class Model(torch.nn.Module):
        def compile(self, **settings):
            calls.append("inductor whole")

        def compile_repeated_blocks(self, **settings):
            calls.append("inductor regional")

    def optimize(model, regional, **options):
        calls.append("ditopt regional" if regional else "ditopt whole")
        assert options == {"router": "sol"}

    monkeypatch.setattr(compile_time.dit_opt, "optimize", optimize)
    compile_time.compile_model(Model(), contestant, {"router": "sol"})
    assert calls == [contestant]
