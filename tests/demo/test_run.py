from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

import dit_opt
from dit_opt._compat import BackendCompilerFailed
from dit_opt.decisions import AttentionReason, GraphRecord, PassRecord, SiteDecision
from dit_opt.demo import run
from dit_opt.demo.run import DemoError, run_demo, write_outputs
from dit_opt.inspect.records import GraphReport
from dit_opt.inspect.report import Report
from dit_opt.inspect.summary import NothingReplaced
from dit_opt.options import OptionError, Options
from tests.demo.stubs import ignore, make_contestants, make_task, refuse_options

FILES = ["contact_sheet.png", "dense.gif", "ditopt.gif", "report.json"]


@pytest.fixture
def result():
    return run_demo(make_contestants(), make_task(steps=3), ignore)


def test_the_demo_samples_all_three_ways(result):
    figures = json.loads(json.dumps(result.to_json()))
    assert set(figures["seconds_per_step"]) == {"eager", "inductor", "ditopt"}
    assert figures["seconds_per_step"]["eager"]["cold"] is None
    # one of three is dense by default, and two follow it
    assert figures["dense_steps"] == 1
    assert figures["cold_steps"] == {"inductor": 3, "ditopt": 3}
    assert len(figures["steps_seconds"]["ditopt"]) == 3
    assert figures["speedup_vs_inductor"] == pytest.approx(
        sum(figures["steps_seconds"]["inductor"]) / sum(figures["steps_seconds"]["ditopt"])
    )
    # the stubs are one model and nothing of them was compiled
    assert figures["accurate"] and figures["ssim"] == pytest.approx(1)
    assert figures["density"] is None and figures["layers"] == []
    assert figures["prompt"] == "a red disk moving left and a blue ring moving up"


def test_a_clip_that_differs_is_not_accurate():
    result = run_demo(make_contestants(ditopt_strength=0.3), make_task(steps=3), ignore)
    assert result.likeness.psnr_db < run.MIN_PSNR_DB
    assert not result.accurate


def test_outputs_are_written_and_whole(result, tmp_path):
    out, copy = tmp_path / "deep" / "demo", tmp_path / "copy.json"
    written = write_outputs(result, out, copy)
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert set(written) == {out / f for f in FILES} | {copy}
    assert json.loads(copy.read_text()) == json.loads((out / "report.json").read_text())
    assert Image.open(out / "ditopt.gif").n_frames == 3


def test_a_failure_in_between_leaves_what_was_there(result, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("old")

    def fail(path, clip):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(run, "write_gif", fail)
    with pytest.raises(OSError, match="disk full"):
        write_outputs(result, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_unusable_places_are_refused_beforehand(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DemoError, match="not a folder"):
        run.check_outputs(file, None)
    with pytest.raises(DemoError, match="folder that exists"):
        run.check_outputs(tmp_path, tmp_path / "missing" / "f.json")
    run.check_outputs(tmp_path / "new", tmp_path / "f.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta"])
def test_bad_devices_are_refused(device):
    with pytest.raises(DemoError, match=r"try --device cpu\.$"):
        run.check_device(device)
    assert run.check_device("cpu") == "cpu"


def test_a_device_that_is_not_here_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(DemoError, match="'cuda' cannot be used here"):
        run.check_device("cuda")


def test_a_bad_prompt_is_answered_with_an_example():
    with pytest.raises(DemoError, match="An example is 'a red disk"):
        run.read_prompt("a dog")


def test_the_cold_pass_is_as_long_as_the_options_need():
    options = Options(verify_every=3, dense_steps=1)
    contestants = dataclasses.replace(make_contestants(), options=options)
    figures = run_demo(contestants, make_task(steps=5), ignore).to_json()
    assert figures["cold_steps"] == {"inductor": 4, "ditopt": 4}


@pytest.mark.parametrize(
    ("calls", "reason", "router", "density"),
    [
        ({"search": 4}, AttentionReason.REPLACED, "keep_all", 1.0),
        ({"dense": 4}, AttentionReason.REPLACED, "keep_all", None),
        ({"dense": 4}, AttentionReason.TOO_SHORT, "", None),
    ],
)
def test_keeping_everything_is_a_density_of_one(monkeypatch, calls, reason, router, density):
    decision = SiteDecision("blocks.0", "", reason, router=router)
    record = GraphRecord((PassRecord("sparse_attention", 1, 0.0, (decision,)),))
    report = Report((GraphReport(record, calls, (), None),))
    monkeypatch.setattr(dit_opt, "report", lambda model: report)
    assert run_demo(make_contestants(), make_task(steps=2), ignore).density == density


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OptionError("grid=(1, 2, 3) is 6 tokens."), r"^grid=\(1, 2, 3\) is 6 tokens\.$"),
        (NothingReplaced("nothing:\na table"), r"^No attention site .* reasons\.$"),
        (KeyError("a bug"), None),
    ],
)
def test_options_that_fail_at_compile_time_are_told_in_a_sentence(error, told):
    contestants = make_contestants()
    pipeline = contestants.pipeline
    pipeline.transformer = refuse_options(pipeline.transformer, error)
    with pytest.raises(DemoError if told else BackendCompilerFailed, match=told):
        run_demo(contestants, make_task(steps=2), ignore)
