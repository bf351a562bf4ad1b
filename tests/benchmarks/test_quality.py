from __future__ import annotations

import json

import pytest

from benchmarks import quality
from benchmarks.quality import ResumeError, aggregate, read_options, run_benchmark, start_result
from dit_opt.options import OptionError
from tests.demo.stubs import ignore, make_contestants, make_task

SETTINGS = {"checkpoint_sha256": "x", "steps": 3, "options": {}, "seed": 0, "versions": {}}


@pytest.fixture(autouse=True)
def no_mass(monkeypatch):
    import torch

    monkeypatch.setattr(quality, "measure_mass", lambda *args: torch.tensor([0.8, 0.9]))


def make_tasks(count: int):
    return [make_task(steps=3, seed=i) for i in range(count)]


def row(psnr: float, density: float | None = 0.25) -> dict:
    return {
        "dense_prompt_score": 1.0,
        "default_prompt_score": 0.5,
        "dense_seconds_per_step": 3.0,
        "default_seconds_per_step": 2.0,
        "psnr_db": psnr,
        "ssim": 0.9,
        "density": density,
    }


def test_means_and_the_low_end():
    out = aggregate([row(30.0), row(40.0, density=0.75), row(50.0, density=None)])
    assert out["dense"] == {"prompt_score": 1.0, "seconds_per_step": 3.0}
    assert out["default"]["prompt_score"] == 0.5
    assert out["default"]["psnr_db"] == pytest.approx(40)
    assert out["default"]["psnr_db_min"] == 30
    assert out["default"]["psnr_db_5th_percentile"] == pytest.approx(31)
    assert out["default"]["density"] == 0.5
    assert out["default"]["speedup"] == 1.5
    assert aggregate([]) == {"dense": {}, "default": {}}


def test_options_are_literals_or_text():
    pairs = ["quality=0.95", "dense_steps=2", "router=rainfusion", "grid=(1, 2, 3)"]
    assert read_options(pairs) == {
        "quality": 0.95,
        "dense_steps": 2,
        "router": "rainfusion",
        "grid": (1, 2, 3),
    }
    with pytest.raises(OptionError, match="name=value"):
        read_options(["quality"])


def test_a_run_gives_every_figure_of_the_issue(tmp_path):
    path = tmp_path / "f.json"
    result = start_result(SETTINGS, path, False, "cpu")
    run_benchmark(make_contestants(0.99), result, make_tasks(3), path, ignore)
    figures = json.loads(path.read_text())
    assert len(figures["rows"]) == figures["prompts"] == 3
    assert len(figures["noise_floor"]["rows"]) == quality.NOISE_PROMPTS
    assert figures["noise_floor"]["psnr_db"] > 100
    assert figures["model"]["mass_best_quarter"] == pytest.approx(0.85)
    assert 20 < figures["default"]["psnr_db"] < 60
    assert figures["dense"]["prompt_score"] == figures["default"]["prompt_score"] == 0
    assert [r["seed"] for r in figures["rows"]] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]
    assert "psnr_db_5th_percentile" in quality.render_result(figures)


def test_the_plot_shows_a_point_for_each_prompt(tmp_path):
    pytest.importorskip("matplotlib")
    result = {"rows": [row(30.0), row(40.0)], "noise_floor": {"psnr_db": 90.0}}
    quality.plot_psnr(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    path, tasks = tmp_path / "f.json", make_tasks(3)
    measure, measured = quality.measure_prompt, []

    def interrupt_third(contestants, task, notify):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(task.seed)
        return measure(contestants, task, notify)

    monkeypatch.setattr(quality, "measure_prompt", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(
            make_contestants(), start_result(SETTINGS, path, False, "cpu"), tasks, path, ignore
        )
    monkeypatch.setattr(quality, "measure_prompt", measure)
    resumed = start_result(SETTINGS, path, True, "cpu")
    assert [r["seed"] for r in resumed["rows"]] == [0, 1]
    before = [r["dense_seconds_per_step"] for r in resumed["rows"]]
    run_benchmark(make_contestants(), resumed, tasks, path, ignore)
    rows = json.loads(path.read_text())["rows"]
    assert [r["seed"] for r in rows] == [0, 1, 2]
    assert [r["dense_seconds_per_step"] for r in rows[:2]] == before


def test_resume_refuses_other_settings(tmp_path):
    path = tmp_path / "f.json"
    with pytest.raises(ResumeError, match="needs --json"):
        start_result(SETTINGS, None, True, "cpu")
    with pytest.raises(ResumeError, match="needs --json"):
        start_result(SETTINGS, path, True, "cpu")
    quality.save_result(start_result(SETTINGS, path, False, "cpu"), path)
    with pytest.raises(ResumeError, match="steps=3, not 4"):
        start_result({**SETTINGS, "steps": 4}, path, True, "cpu")
    path.write_text("{")
    with pytest.raises(ResumeError, match="no result file"):
        start_result(SETTINGS, path, True, "cpu")


def test_a_missing_checkpoint_ends_the_command_with_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.safetensors is missing"):
        quality.main(["--prompts", "1", "--checkpoint", str(tmp_path / "none.safetensors")])
