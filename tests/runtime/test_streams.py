from __future__ import annotations

import torch

from dit_opt.runtime.streams import read_timesteps


def test_timesteps_are_read_as_they_are_given():
    given = {
        1: torch.tensor([0.0, 750.0]),
        4: 600,
        7: torch.tensor(999),
        9: torch.tensor(3.5, dtype=torch.bfloat16),
    }
    eps = [torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16)]
    assert read_timesteps(given) == {
        1: (750.0, eps[0]),
        4: (600.0, 0.0),
        7: (999.0, 0.0),
        9: (3.5, eps[1]),
    }
