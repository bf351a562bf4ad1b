from __future__ import annotations

import json

import pytest

from benchmarks import quality_result
from benchmarks.quality_result import ResumeError, aggregate, find_front, start_result

SETTINGS = {"checkpoint_sha256": "x", "steps": 3, "configurations": {}, "seed": 0, "versions": {}}
PROMPTS = ["a cat", "a dog"]


def sample(psnr: float, density: float | None = 0.25) -> dict:
    found = {
        "prompt_score": 0.5,
        "seconds_per_step": 2.0,
        "psnr_db": psnr,
        "ssim": 0.9,
        "density": density,
    }
    return {
        "dense": {"prompt_score": 1.0, "seconds_per_step": 3.0},
        "configurations": {"default": found, "slow": {**found, "seconds_per_step": 6.0}},
    }


def test_means_and_the_low_end():
    asked = {"default": {}, "slow": {"router": "oracle", "tail": "centroid"}}
    out = aggregate([sample(30.0), sample(40.0, density=0.75), sample(50.0, density=None)], asked)
    assert out["dense"] == {"prompt_score": 1.0, "seconds_per_step": 3.0}
    assert out["default"]["prompt_score"] == 0.5
    assert out["default"]["psnr_db"] == pytest.approx(40)
    assert out["default"]["psnr_db_min"] == 30
    assert out["default"]["psnr_db_5th_percentile"] == pytest.approx(31)
    assert out["default"]["density"] == 0.5
    assert out["default"]["speedup"] == 1.5
    assert [row["speedup"] for row in out["rows"]] == [1.5, 0.5]
    assert out["rows"][1]["options"] == asked["slow"]
    assert aggregate([], asked) == {"dense": {}, "default": {}, "rows": []}


def test_the_front_holds_what_nothing_beats():
    points = [(1, 1), (2, 2), (0, 3), (2, 1), (0, 2)]
    assert find_front(points) == [1, 2]
    assert find_front([(1, 1), (1, 1)]) == [0, 1]


def test_the_plot_shows_a_point_for_each_configuration(tmp_path):
    asked = {"default": {}, "slow": {"router": "oracle", "tail": "centroid"}}
    result = aggregate([sample(30.0), sample(40.0)], asked)
    result |= {"prompts": 2, "steps": 3, "machine": {"cpu": "a processor"}}
    quality_result.plot_pareto(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_resume_refuses_other_settings(tmp_path):
    path = tmp_path / "f.json"
    with pytest.raises(ResumeError, match="needs --json"):
        start_result(SETTINGS, None, True, "cpu", PROMPTS)
    with pytest.raises(ResumeError, match="needs --json"):
        start_result(SETTINGS, path, True, "cpu", PROMPTS)
    quality_result.save_result(start_result(SETTINGS, path, False, "cpu", PROMPTS), path)
    # what JSON turns into lists is the same setting still
    start_result({**SETTINGS, "configurations": {}}, path, True, "cpu", PROMPTS)
    with pytest.raises(ResumeError, match="steps=3, not 4"):
        start_result({**SETTINGS, "steps": 4}, path, True, "cpu", PROMPTS)
    path.write_text("{")
    with pytest.raises(ResumeError, match="no result file"):
        start_result(SETTINGS, path, True, "cpu", PROMPTS)


def test_resume_refuses_another_device_and_other_prompts(tmp_path):
    path = tmp_path / "f.json"
    result = start_result(SETTINGS, path, False, "cpu", PROMPTS)
    result["noise_floor"]["samples"] = [
        {"prompt": prompt, "psnr_db": 30.0, "ssim": 1.0} for prompt in PROMPTS
    ]
    quality_result.save_result(result, path)
    with pytest.raises(ResumeError, match="device=cpu, not cuda"):
        start_result(SETTINGS, path, True, "cuda", PROMPTS)
    # stopped after the noise floor
    with pytest.raises(ResumeError, match="prompt 2 'a dog', not 'a bird';"):
        start_result(SETTINGS, path, True, "cpu", ["a cat", "a bird"])
    result["samples"] = [{"prompt": prompt} for prompt in [*PROMPTS, "a fox"]]
    path.write_text(json.dumps(result))
    with pytest.raises(ResumeError, match="prompt 3 'a fox', not 'a cat';"):
        start_result(SETTINGS, path, True, "cpu", [*PROMPTS, "a cat"])
    with pytest.raises(ResumeError, match="3 prompts, not 2;"):
        start_result(SETTINGS, path, True, "cpu", PROMPTS)
    with pytest.raises(ResumeError, match="steps=3, not 4, and device=cpu, not cuda, and prompt 1"):
        start_result({**SETTINGS, "steps": 4}, path, True, "cuda", ["a bird"])
    # more prompts after the same ones are measured besides
    more = [*PROMPTS, "a fox", "a bird"]
    assert start_result(SETTINGS, path, True, "cpu", more)["samples"] == result["samples"]
