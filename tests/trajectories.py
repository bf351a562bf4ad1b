"""Denoising runs of tiny models, and how far apart their outputs are."""

from __future__ import annotations

import torch

from dit_opt.backend import ditopt
from dit_opt.runtime.registry import live_bounds
from zoo.small import wan

TRAJECTORY = (999.0, 750.0, 500.0, 250.0)


def big_wan(**kwargs):
    """Long enough for lists that drop blocks: 4 x 12 x 16 tokens are 6 x 12 blocks."""
    return wan(grid=(4, 12, 16), **kwargs)


def compiled(model, dynamic=None, **options):
    """The model under the backend."""
    return torch.compile(model, backend=ditopt, dynamic=dynamic, options=options)


def run_trajectory(model, inputs, timesteps=TRAJECTORY):
    """The output at each timestep, on the same latents."""
    with torch.no_grad():
        return [
            model(**{**inputs, "timestep": torch.full_like(inputs["timestep"], t)})[0].clone()
            for t in timesteps
        ]


def layouts_of(model=None):
    """(T, H, W, start, N) of the sites that have values of slots; of one model, or of all."""
    owners = None if model is None else {id(p) for p in model.parameters()}
    found = set()
    for bound in live_bounds():
        for owner, (_, place), (stream, *_), _ in bound.store:
            if owners is None or id(owner) in owners:
                sizes = bound.pin_sizes[stream[1]]
                pins = zip(bound.plan.pins, sizes, strict=True)
                found |= {tuple(of_pin) for pin, of_pin in pins if pin.place == place}
    return found


def grids_of(model):
    """The grids of the layers that have plans."""
    return {layout[:3] for layout in layouts_of(model)}


def summary_of(record, name):
    """What a report says of a pass; "" where it did not run, or had nothing to say."""
    return "".join(each.summary for each in record.passes if each.name == name)


def relative_error(out, reference):
    """L2 norm of the difference over that of the reference."""
    return float((out - reference).norm() / reference.norm())
