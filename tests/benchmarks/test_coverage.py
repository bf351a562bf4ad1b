from __future__ import annotations

import inspect
import json

import pytest
import torch

from benchmarks import coverage, coverage_images, coverage_video


def broken():
    raise ValueError("no such model\nas far as we know")


def refusing():
    return torch.nn.Linear(2, 2), {"nonsense": 1}


def run(capsys, *arguments):
    """Exit status and printed table."""
    status = coverage.main(arguments)
    return status, capsys.readouterr().out


def test_each_builder_is_listed_once_and_says_what_is_special():
    names = [builder.__name__ for builder in coverage.BUILDERS]
    assert len(set(names)) == len(names) > 65
    written = [
        name
        for module in (coverage_video, coverage_images)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert sorted(names) == sorted(written)
    assert all(builder.__doc__ for builder in coverage.BUILDERS)


def test_replaced_sites_are_counted_without_cross_attention(capsys, fresh_dynamo, tmp_path):
    path = tmp_path / "coverage.json"
    status, out = run(capsys, "--only", "wan", "qwen_edit", "--json", str(path))
    assert status == 0 and "of 2 models: 2 all, 0 some, 0 none" in out
    result = json.loads(path.read_text())
    assert result["density"] == 0.25 and result["versions"]["torch"]
    wan, edit = result["models"]
    assert (wan["name"], wan["model"], wan["graphs"]) == ("wan", "WanTransformer3DModel", 1)
    assert (wan["replaced"], wan["sites"], wan["grids"]) == (2, 2, ["(5, 13, 17)"])
    assert wan["left"] == {"CROSS_ATTENTION": 2}
    # both pictures are one segment of latents
    assert (edit["replaced"], edit["sites"], edit["grids"]) == (2, 2, ["(2, 33, 35)"])
    assert edit["left"] == {} and edit["verdict"] == "all"


def test_what_fails_is_a_row_and_sets_the_exit_status(monkeypatch, capsys, fresh_dynamo):
    monkeypatch.setattr(coverage, "BUILDERS", (broken, refusing))
    status, out = run(capsys)
    lines = out.splitlines()
    assert status == 1 and len(lines) == 5
    assert lines[2].startswith("broken") and lines[2].endswith("ValueError: no such model")
    # built, but it takes other inputs
    assert lines[3].startswith("refusing") and " Linear " in lines[3] and "TypeError: " in lines[3]
    assert lines[4].endswith("of 2 models: 0 all, 0 some, 0 none; 2 with errors")


def test_what_was_left_alone_says_why(capsys, fresh_dynamo):
    status, out = run(capsys, "--only", "kandinsky6_sr")
    row = out.splitlines()[2]
    assert status == 0 and "0 / 2" in row and "none" in row and row.endswith("FLEX 2")
    assert "0 all, 0 some, 1 none" in out


@pytest.mark.parametrize(
    ("replaced", "left", "verdict"),
    [
        (2, {}, "all"),
        (2, {"TEXT_ONLY": 1, "TOO_SHORT": 2}, "all"),
        (2, {"TEXT_ONLY": 1, "FLEX": 1}, "some"),
        (0, {"CAUSAL": 1}, "none"),
        (0, {"TEXT_ONLY": 1}, "no sites"),
    ],
)
def test_sites_that_are_rightly_dense_are_set_apart(replaced, left, verdict):
    row = coverage.Row("x", replaced=replaced, sites=replaced + sum(left.values()), left=left)
    assert row.verdict == verdict
