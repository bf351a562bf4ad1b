from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import coverage
from zoo import MODELS


def prepare_in_vain():
    raise ValueError("no such model\nas far as we know")


def run(capsys, *arguments):
    """Exit status and printed table."""
    status = coverage.main(arguments)
    return status, capsys.readouterr().out


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
    wan = MODELS["wan"]
    broken = {
        "unbuilt": dataclasses.replace(wan, name="unbuilt", prepare=prepare_in_vain),
        "missing": dataclasses.replace(wan, name="missing", class_name="NoSuchTransformer"),
        "refusing": dataclasses.replace(wan, name="refusing", inputs={"nonsense": 1}),
    }
    monkeypatch.setattr(coverage, "MODELS", broken)
    status, out = run(capsys)
    lines = out.splitlines()
    assert status == 1 and len(lines) == 6
    unbuilt, missing, refusing = lines[2:5]
    assert "WanTransformer3DModel" in unbuilt and unbuilt.endswith("ValueError: no such model")
    # an older diffusers lacks some classes
    assert "AttributeError: " in missing and "NoSuchTransformer" in missing
    # built, but it takes other inputs
    assert refusing.startswith("refusing") and "TypeError: " in refusing
    assert lines[5].endswith("of 3 models: 0 all, 0 some, 0 none; 3 with errors")


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
    row = coverage.Row("x", "X", replaced=replaced, sites=replaced + sum(left.values()), left=left)
    assert row.verdict == verdict
