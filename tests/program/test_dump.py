from __future__ import annotations

import logging

import torch

from dit_opt.program import dump
from dit_opt.program.dump import Dumper
from tests.graphs import capture_one


def edit(gm):
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        doubled = gm.graph.call_function(torch.mul, (output.args[0][0], 2))
    output.args = ((doubled,),)
    gm.recompile()


def make_graph():
    return capture_one(lambda x: x + 1, torch.ones(2, 3))


def test_files_before_after_and_diff(tmp_path):
    gm = make_graph()
    dumper = Dumper(tmp_path / "new")
    dumper.graph("capture", gm)
    with dumper.around("double", gm, "search"):
        edit(gm)
    (folder,) = (tmp_path / "new").iterdir()
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "00_capture.py",
        "01_double.search.after.py",
        "01_double.search.before.py",
        "01_double.search.diff",
    ]
    read = {p.name: p.read_text() for p in folder.iterdir()}
    assert read["00_capture.py"] == read["01_double.search.before.py"]
    assert "f32[2, 3][3, 1]cpu" in read["00_capture.py"]
    added = [li for li in read["01_double.search.diff"].splitlines() if li.startswith("+ ")]
    assert any("torch.mul" in line for line in added)
    assert "torch.mul" in read["01_double.search.after.py"]
    assert "torch.mul" not in read["01_double.search.before.py"]


def test_every_graph_has_a_folder(tmp_path):
    for _ in range(2):
        Dumper(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    # another process counts from zero again
    dump._graph_numbers, kept = iter(range(100)), dump._graph_numbers
    try:
        for _ in range(2):
            Dumper(tmp_path)
    finally:
        dump._graph_numbers = kept
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_is_rendered_without_a_reader(monkeypatch):
    gm = make_graph()
    monkeypatch.setattr(dump, "is_tracing", lambda: False)
    monkeypatch.setattr(dump, "_render", lambda gm: 1 / 0)
    dumper = Dumper(None)
    dumper.graph("capture", gm)
    with dumper.around("double", gm):
        edit(gm)


def test_structured_trace(monkeypatch):
    artifacts = {}
    monkeypatch.setattr(dump, "is_tracing", lambda: True)
    monkeypatch.setattr(dump, "emit_artifact", artifacts.__setitem__)
    gm = make_graph()
    dumper = Dumper(None)
    with dumper.around("double", gm):
        edit(gm)
    suffixes = [name.split("_double")[-1] for name in artifacts]
    assert suffixes == [".before.py", ".after.py", ".diff"]
    assert all(name.startswith("ditopt_") for name in artifacts)


def test_diffs_are_logged(caplog):
    gm = make_graph()
    with caplog.at_level(logging.DEBUG, logger="dit_opt"):
        with Dumper(None).around("double", gm):
            edit(gm)
    assert any("torch.mul" in r.getMessage() for r in caplog.records if r.name == dump.__name__)


def test_a_failing_pass_keeps_its_error(tmp_path):
    dumper = Dumper(tmp_path)
    try:
        with dumper.around("broken", make_graph()):
            raise KeyError("pass")
    except KeyError:
        pass
    # what the graph was before is what one needs then
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in folder.iterdir()] == ["00_broken.before.py"]
