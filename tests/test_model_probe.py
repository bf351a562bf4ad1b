from __future__ import annotations

import functools

import pytest
import torch
from diffusers import WanTransformer3DModel

from dit_opt import model_probe
from dit_opt.model_probe import (
    ATTEMPTS,
    ModelProbe,
    ProbeResult,
    keep_one_of_each_block,
    read_model,
)
from zoo import small
from zoo.small import break_apart, hunyuan_video, sd3, wan

pytestmark = pytest.mark.usefixtures("eager")

WITH_GRID = [make for make in small.ALL if make().grid is not None]


@pytest.fixture
def traced(monkeypatch):
    """The number of attention calls in each graph that is read."""
    counts = []

    def count(graph):
        sites = find_sites(graph)
        counts.append(len(sites))
        return sites

    find_sites = model_probe.find_sites
    monkeypatch.setattr(model_probe, "find_sites", count)
    return counts


def read(tiny, model=None):
    with torch.no_grad():
        return read_model(tiny.model if model is None else model, (), tiny.inputs).grid


@pytest.mark.parametrize("make", WITH_GRID, ids=lambda make: make.__name__)
def test_the_grid_is_that_of_the_whole_model(make):
    tiny = make()
    assert read(tiny) == tiny.grid


def test_a_broken_model_tells_the_grid_of_what_its_first_graph_hands_on():
    tiny = wan()
    assert read(tiny, break_apart(tiny.model)) == tiny.grid


def test_one_block_of_a_kind_is_traced(traced):
    tiny = wan(layers=3)
    assert read(tiny) == tiny.grid
    # self-attention and cross-attention
    assert traced == [2]


def test_the_copy_has_one_block_of_each_list_and_the_model_all():
    model = hunyuan_video(layers=3).model
    short = keep_one_of_each_block(model)
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        whole = list(getattr(model, blocks))
        assert len(whole) == 3
        assert list(getattr(short, blocks)) == whole[:1]
    assert set(short.parameters()) < set(model.parameters())


class Mixed(torch.nn.Module):
    _repeated_blocks = ("Linear", "Conv1d")

    def __init__(self):
        super().__init__()
        kinds = ("Linear", "LayerNorm", "Linear", "Conv1d", "LayerNorm", "Conv1d")
        make = {
            "Linear": lambda: torch.nn.Linear(4, 4),
            "LayerNorm": lambda: torch.nn.LayerNorm(4),
            "Conv1d": lambda: torch.nn.Conv1d(4, 4, 1),
        }
        self.stage = torch.nn.Sequential(torch.nn.ModuleList(make[kind]() for kind in kinds))
        self.outside = torch.nn.Linear(4, 4)
        self.absent = None


def test_what_is_no_repeated_block_of_a_list_stays():
    model = Mixed()
    short = keep_one_of_each_block(model)
    kept = [type(block).__name__ for block in short.stage[0]]
    assert kept == ["Linear", "LayerNorm", "Conv1d", "LayerNorm"]
    assert short.stage[0][2] is model.stage[0][3] and len(model.stage[0]) == 6
    assert short.outside is model.outside and short.absent is None


@pytest.mark.parametrize("model", [torch.nn.Linear(4, 4), wan(layers=1).model], ids=["none", "one"])
def test_nothing_is_copied_where_no_block_is_repeated(model):
    assert keep_one_of_each_block(model) is None


class LastBlockFirst(WanTransformer3DModel):
    """Counts on all its blocks before anything is computed."""

    def forward(self, **inputs):
        self.blocks[len(self.blocks) - 1 if len(self.blocks) > 1 else 2].train(False)
        return super().forward(**inputs)


def test_a_model_that_counts_on_its_blocks_is_traced_whole(traced):
    tiny = wan(layers=3)
    tiny.model.__class__ = LastBlockFirst
    with pytest.raises(IndexError):
        keep_one_of_each_block(tiny.model)(**tiny.inputs)
    assert read(tiny) == tiny.grid
    assert traced[-1] == 6


def test_a_forward_that_is_bound_to_the_whole_model_is_traced_whole(traced):
    # as hooks that offload weights leave it
    tiny = sd3(layers=2)
    tiny.model.forward = functools.partial(type(tiny.model).forward, tiny.model)
    assert read(tiny) == tiny.grid
    assert traced == [3]


def test_no_grid_is_none(traced):
    assert read(small.flux(layers=2)) is None
    # once with one block of each kind, once with all
    assert traced == [2, 4]


def test_where_dynamo_makes_no_graph_attempts_end(monkeypatch, caplog):
    tiny, attempts = wan(layers=1), []
    monkeypatch.setattr(model_probe, "read_model", lambda *call: attempts.append(call))
    reader = ModelProbe(tiny.model)
    for _ in range(ATTEMPTS + 2):
        assert reader.read(tiny.model, (), tiny.inputs) == ProbeResult()
    assert len(attempts) == ATTEMPTS
    (record,) = caplog.records
    assert "TORCHDYNAMO_DISABLE" in record.getMessage()


def test_numbers_that_change_the_grid_are_sizes(monkeypatch):
    asked = []

    def read_model(model, args, kwargs):
        asked.append(kwargs)
        return ProbeResult(grid=(1, kwargs["height"], kwargs["width"]))

    monkeypatch.setattr(model_probe, "read_model", read_model)
    model = torch.nn.Linear(1, 1)
    model.forward = lambda x, **sizes: x
    reader = ModelProbe(model)
    for step, (height, width) in enumerate([(2, 3), (3, 2), (2, 3), (2, 3), (3, 2), (6, 1)]):
        kwargs = {"height": height, "width": width, "step": step}
        telling = reader.read(model, (torch.zeros(1),), kwargs)
        assert telling.grid == (1, height, width)
    # the third call told that the step is no size
    assert len(asked) == 4


@pytest.mark.parametrize("make", [wan, sd3], ids=lambda make: make.__name__)
def test_the_step_is_the_tensor_that_is_embedded(make):
    tiny = make()
    with torch.no_grad():
        assert read_model(tiny.model, (), tiny.inputs).timesteps == (("timestep",),)
