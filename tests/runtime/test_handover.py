"""Models that Dynamo breaks into several graphs, and what one of these tells the next."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

import dit_opt
from dit_opt.runtime.clock import StepIndex
from dit_opt.runtime.handover import CallTime, read_call_time, read_spans, tag_outputs
from dit_opt.runtime.registry import live_bounds
from tests.trajectories import big_wan, compiled, grids_of, layouts_of, run_trajectory
from zoo.small import break_apart, wan

SPANS = ((1, ((60, (3, 4, 5)), (7, None))),)
OPTIONS = {
    # It needs a grid.
    "router": "rainfusion",
    "density": 0.6,
    "min_tokens": 0,
    "dense_steps": 1,
    "refresh_every": 2,
}


def calls_of(model):
    """How often each mode ran, of the graphs that are ever sparse."""
    return [g.calls for g in dit_opt.report(model).graphs if "search" in g.calls]


def test_a_tensor_keeps_its_tags_while_it_lives():
    tagged, other, time = torch.zeros(2), torch.zeros(2), CallTime(lambda: None)
    tag_outputs((other, tagged, 3), {1: SPANS}, time)
    assert read_spans(enumerate([3, tagged, None, other])) == {1: SPANS}
    assert read_call_time([None, torch.zeros(2), tagged]) is time
    assert read_spans([(0, tagged.clone())]) == {} and read_call_time([tagged.view(2)]) is None
    del tagged, other
    gc.collect()
    assert read_spans((i, torch.zeros(2)) for i in range(9)) == {}


def test_a_timestep_is_read_once_and_only_if_a_later_graph_asks():
    reads = []

    def locate():
        reads.append(1)
        return StepIndex(1, (1, 0), 0, 0, 1.0, True)

    time = CallTime(locate)
    assert not reads
    assert time.step_index is time.step_index is not None and len(reads) == 1


@pytest.mark.usefixtures("eager")
def test_a_broken_model_runs_as_the_whole_one():
    tiny = big_wan()
    whole, broken = big_wan().model, break_apart(tiny.model)
    expected = run_trajectory(compiled(whole, **OPTIONS), tiny.inputs)
    found = run_trajectory(compiled(broken, **OPTIONS), tiny.inputs)
    for out, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
    assert len(dit_opt.report(broken).graphs) > 1
    assert calls_of(broken) == calls_of(whole) == [{"dense": 1, "search": 2, "reuse": 1}]
    assert grids_of(broken) == grids_of(whole) == {(4, 12, 16)}


@pytest.mark.usefixtures("eager")
def test_a_broken_model_keeps_the_plans_of_branches_apart():
    tiny = big_wan()
    model = compiled(break_apart(tiny.model), **OPTIONS)
    with torch.no_grad():
        for t in (999.0, 750.0):
            for _ in range(2):
                model(**{**tiny.inputs, "timestep": torch.tensor([t])})
    branches = {branch for b in live_bounds() for _, _, (_, branch, _), _ in b.store}
    assert branches == {0, 1}


@pytest.mark.usefixtures("eager")
def test_each_layout_of_as_many_tokens_has_a_graph_of_its_own():
    tiny = {grid: wan(grid=grid) for grid in [(4, 12, 16), (4, 16, 12)]}
    broken = break_apart(tiny[4, 12, 16].model)
    model = compiled(broken, dynamic=False, **OPTIONS)
    whole = compiled(big_wan().model, dynamic=False, **OPTIONS)
    for grid in (*tiny, *tiny):
        found = run_trajectory(model, tiny[grid].inputs, (999.0, 750.0))
        expected = run_trajectory(whole, tiny[grid].inputs, (999.0, 750.0))
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert grids_of(broken) == set(tiny)


@pytest.mark.usefixtures("eager")
def test_sizes_that_differ_from_call_to_call_are_said_to_be_in_the_way(caplog):
    tiny = big_wan()
    model = compiled(break_apart(tiny.model), dynamic=True, **OPTIONS | {"router": "auto"})
    run_trajectory(model, tiny.inputs, (999.0, 750.0))
    assert "dynamic=False" in caplog.text and grids_of(tiny.model) == set()


class Refined(torch.nn.Module):
    """Refines its text before Dynamo breaks it; its tokens are made before that, or after."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def forward(self, video, text):
        if self.early:
            video = video.flatten(2).transpose(1, 2)
        text = attend(text)
        torch._dynamo.graph_break()
        if not self.early:
            video = video.flatten(2).transpose(1, 2)
        return attend(torch.cat([text, video], 1))[:, text.shape[1] :].unflatten(1, (3, 4, 5))


def attend(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


@pytest.mark.usefixtures("eager")
def test_a_graph_that_hands_the_latents_on_is_not_blamed_for_its_text(caplog):
    video, text = torch.randn(1, 16, 3, 4, 5), torch.randn(1, 7, 16)
    options = {"density": 0.5, "min_tokens": 0, "dense_steps": 0, "on_no_match": "error"}
    with torch.no_grad():
        for more in ({}, {"router": "rainfusion"}, {"grid": (3, 4, 5)}):
            compiled(Refined(early=True), **options, **more)(video, text)
            assert {layout[:4] for layout in layouts_of()} == {(3, 4, 5, 7)}
            torch.compiler.reset()
        assert "replaced no attention site" not in caplog.text
        torch.compiler.reset()
        with pytest.raises(Exception, match="replaced no attention site"):
            compiled(Refined(early=False), **options)(video, text)


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_knows_the_grid_behind_a_break():
    tiny = big_wan()
    found = dit_opt.explain(break_apart(tiny.model), **tiny.inputs, options=OPTIONS)
    grids = {str(d.layout.grid) for d in found.decisions if d.replaced}
    assert len(found.graphs) > 1 and grids == {"(4, 12, 16)"}


@pytest.mark.usefixtures("eager")
def test_a_grid_of_the_options_needs_no_handing_over():
    tiny = big_wan()
    model = compiled(break_apart(tiny.model), **OPTIONS, grid=(4, 12, 16))
    run_trajectory(model, tiny.inputs, (999.0, 750.0))
    assert grids_of(tiny.model) == {(4, 12, 16)}
