from __future__ import annotations

import json

import pytest

from benchmarks import quality, quality_subjects
from benchmarks.quality import list_configurations, measure_prompt, run_benchmark
from benchmarks.quality_result import render_result, start_result
from benchmarks.quality_subjects import DemoSubject
from dit_opt.demo.side_by_side import Pipeline
from dit_opt.options import OptionError
from tests.demo.stubs import SIZE, StubDenoiser, ignore, make_contestants

SETTINGS = {
    "checkpoint_sha256": "x",
    "steps": 3,
    "configurations": {"default": {}, "other": {"density": 0.25}},
    "seed": 0,
    "versions": {},
}
PROMPTS = DemoSubject.list_prompts(3)


@pytest.fixture(autouse=True)
def no_mass(monkeypatch):
    import torch

    monkeypatch.setattr(quality_subjects, "measure_mass", lambda *args: torch.tensor([0.8, 0.9]))


def make_subject(strength: float = 1.0) -> DemoSubject:
    others = {"other": Pipeline(StubDenoiser(0.9), None)}
    return DemoSubject(make_contestants(strength), "default", others, 3, "cpu", SIZE)


def test_configurations_are_all_combinations_on_top_of_the_default():
    base = {"quality": 0.95, "refresh_every": 2}
    assert [c.options for c in list_configurations(base)] == [base]
    found = list_configurations(base, ["sol", "adaspa"], [0.25], ["drop", "centroid"])
    assert [c.name for c in found] == [
        "default",
        "sol density=0.25 tail=drop",
        "sol density=0.25 tail=centroid",
        "adaspa density=0.25 tail=drop",
        "adaspa density=0.25 tail=centroid",
    ]
    # a density takes the place of the quality
    assert found[1].options == {
        "refresh_every": 2,
        "router": "sol",
        "density": 0.25,
        "tail": "drop",
    }
    with pytest.raises(OptionError, match="density"):
        list_configurations({}, densities=[1.5])
    also = list_configurations(base, others=["router=sol density=0.2 quality=None"])[1]
    assert also.name == "router=sol density=0.2 quality=None"
    assert also.options == {**base, "router": "sol", "density": 0.2, "quality": None}
    with pytest.raises(OptionError, match="must be written name=value"):
        list_configurations({}, others=["sol"])


def test_a_run_gives_every_figure_of_the_issue(tmp_path):
    path = tmp_path / "f.json"
    result = start_result(SETTINGS, path, False, "cpu", PROMPTS)
    run_benchmark(make_subject(0.99), result, PROMPTS, 5, path, ignore)
    figures = json.loads(path.read_text())
    assert len(figures["samples"]) == figures["prompts"] == 3
    assert [s["seed"] for s in figures["samples"]] == [5, 6, 7]
    assert len(figures["noise_floor"]["samples"]) == quality.NOISE_PROMPTS
    assert figures["noise_floor"]["psnr_db"] > 100
    assert figures["model"]["mass_best_quarter"] == pytest.approx(0.85)
    assert figures["dense"]["prompt_score"] == figures["default"]["prompt_score"] == 0
    default, other = figures["rows"]
    assert default["name"] == "default" and other["options"] == {"density": 0.25}
    assert 20 < other["psnr_db"] < default["psnr_db"] < 60
    for key in ("psnr_db", "ssim", "prompt_score", "density", "seconds_per_step"):
        assert figures["default"][key] == default[key]
    assert list(tmp_path.iterdir()) == [path]
    assert "psnr_db_min" in render_result(figures) and "other" in render_result(figures)


def test_an_interrupted_run_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    path, measured = tmp_path / "f.json", []

    def interrupt_third(subject, prompt, seed, notify):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(seed)
        return measure_prompt(subject, prompt, seed, notify)

    monkeypatch.setattr(quality, "measure_prompt", interrupt_third)
    started = start_result(SETTINGS, path, False, "cpu", PROMPTS)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(make_subject(), started, PROMPTS, 0, path, ignore)
    monkeypatch.setattr(quality, "measure_prompt", measure_prompt)
    resumed = start_result(SETTINGS, path, True, "cpu", PROMPTS)
    assert [s["seed"] for s in resumed["samples"]] == [0, 1]
    before = [s["dense"] for s in resumed["samples"]]
    run_benchmark(make_subject(), resumed, PROMPTS, 0, path, ignore)
    samples = json.loads(path.read_text())["samples"]
    assert [s["seed"] for s in samples] == [0, 1, 2]
    assert [s["dense"] for s in samples[:2]] == before


def test_a_changed_prompt_file_is_not_mixed_into_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setattr(quality.PipelineSubject, "load", lambda *args: make_subject())
    prompts, path = tmp_path / "prompts.txt", tmp_path / "f.json"
    argv = ["--pipeline", "any", "--prompt-file", str(prompts), "--json", str(path), "--steps", "3"]
    prompts.write_text("\n".join(PROMPTS[:2]))
    quality.main(argv)
    before = path.read_text()
    prompts.write_text("\n".join([PROMPTS[2], PROMPTS[1]]))
    with pytest.raises(SystemExit, match=f"prompt 1 '{PROMPTS[0]}', not '{PROMPTS[2]}'"):
        quality.main([*argv, "--resume"])
    assert path.read_text() == before
    prompts.write_text("\n".join(PROMPTS))
    quality.main([*argv, "--resume"])
    assert [s["prompt"] for s in json.loads(path.read_text())["samples"]] == PROMPTS


def test_a_missing_checkpoint_ends_the_command_with_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.safetensors is missing"):
        quality.main(["--prompts", "1", "--checkpoint", str(tmp_path / "none.safetensors")])


def test_a_pipeline_that_is_not_there_ends_the_command_with_a_sentence(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    argv = ["--pipeline", str(tmp_path / "none"), "--prompt-file", str(prompts)]
    with pytest.raises(SystemExit, match="none"):
        quality.main(argv)
    with pytest.raises(SystemExit):
        quality.main(argv[:2])


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    monkeypatch.setattr(quality, "load_subject", lambda args: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        quality.main(["--plot", "plot.png"])
    assert "--plot needs matplotlib" in capsys.readouterr().err
