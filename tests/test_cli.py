from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import dit_opt
from dit_opt.cli import app, main
from dit_opt.demo import side_by_side
from dit_opt.options import OptionError, Options
from tests.demo.stubs import SIZE, make_contestants, refuse_options


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield lambda *args: CliRunner().invoke(app, list(args))
    torch.set_num_threads(threads)


@pytest.fixture
def stub(monkeypatch):
    """Lets the demo run a stub on small clips; called with how far ditopt's model is off."""

    def install(strength: float = 1.0) -> None:
        task = side_by_side.Task
        monkeypatch.setattr(
            side_by_side, "Task", lambda *a, **k: dataclasses.replace(task(*a, **k), size=SIZE)
        )

        def load(checkpoint, steps, device, options):
            return dataclasses.replace(make_contestants(strength), options=Options.parse(options))

        monkeypatch.setattr(side_by_side, "load_contestants", load)

    return install


def test_help_and_version(invoke):
    assert "demo" in invoke("--help").stdout
    assert "--checkpoint" in invoke("demo", "--help").stdout
    assert invoke("--version").stdout == f"ditopt {dit_opt.__version__}\n"


def test_the_package_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "dit_opt", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"ditopt {dit_opt.__version__}\n"), done.stderr


def test_tuning_needs_triton(invoke, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("tune")
    assert result.exit_code == 2 and "Triton, which is not installed" in result.stderr


def test_tuning_needs_a_gpu(invoke, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("tune")
    assert result.exit_code == 2 and "PyTorch sees none" in result.stderr


@pytest.mark.parametrize("options", [[], ["--variants"]])
def test_variants_are_tuned_on_request_only(invoke, monkeypatch, options):
    pytest.importorskip("triton")
    from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling
    from dit_opt.kernels.block_sparse_attention.impl.triton.tuning import Trial
    from dit_opt.tuning import tune

    def tune_kernel(dims, workload, device, with_variants):
        assert with_variants == bool(options)
        return {"card": [Trial(Tiling(128, 64, 4, 3, "gluon"), None, "hung")]}, "tilings.json"

    monkeypatch.setattr(tune, "tune_kernel", tune_kernel)
    printed = invoke("tune", *options).stdout
    assert "gluon" in printed and "hung" in printed and "tilings.json" in printed


def test_the_console_script_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ditopt", "demo", "--prompt", "a cow"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("ditopt demo: The phrase 'a cow'")


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (["--prompt", "a pink cow"], "must name one colour"),
        (["--device", "abacus"], "'abacus' cannot be used here"),
        (["--checkpoint", "none.safetensors"], "none.safetensors is missing"),
        (["--checkpoint", "corrupt.safetensors"], "corrupt.safetensors cannot be read"),
        (["--json", "missing/f.json"], "folder that exists"),
        (["--option", "router"], "must be written name=value"),
        (["--option", "rooter=sol"], "'router'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(invoke, tmp_path, args, cause):
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"not weights at all")
    result = invoke("demo", *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ditopt demo: ") and cause in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [corrupt]


@pytest.mark.parametrize("args", [["--steps", "0"], ["--steps", "x"], ["--colour", "red"]])
def test_bad_flags_are_refused(invoke, tmp_path, args):
    assert invoke("demo", *args).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_good_run_ends_with_a_table_and_files(invoke, stub, tmp_path):
    stub()
    result = invoke("demo", "--steps", "3", "--threads", "1", "--json", "f.json", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert "speedup over Inductor" in result.stdout
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["seed"] == 5 and figures["steps"] == 3
    assert figures["machine"]["threads"] == 1
    assert (tmp_path / "demo" / "contact_sheet.png").exists()


def test_an_inaccurate_run_warns_and_fails(invoke, stub):
    stub(strength=0.3)
    result = invoke("demo", "--steps", "3")
    assert result.exit_code == 1
    assert "its speedup does not count" in " ".join(result.stderr.split())


def test_options_of_the_backend_reach_the_model_and_the_report(invoke, stub, tmp_path):
    stub()
    options = ("--option", "router=rainfusion", "--option", "dense_steps=2")
    result = invoke("demo", "--steps", "3", "--json", "f.json", *options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["options"]["router"] == "rainfusion" and figures["dense_steps"] == 2


def test_an_option_that_does_not_suit_the_model_is_one_sentence(
    invoke, stub, tmp_path, monkeypatch
):
    stub()
    load = side_by_side.load_contestants

    def refusing(*args):
        contestants = load(*args)
        pipeline = contestants.pipeline
        pipeline.transformer = refuse_options(pipeline.transformer, OptionError("Not this grid."))
        return contestants

    monkeypatch.setattr(side_by_side, "load_contestants", refusing)
    result = invoke("demo", "--steps", "3")
    assert result.exit_code == 2
    assert result.stderr == "ditopt demo: Not this grid.\n"
    assert list(tmp_path.iterdir()) == []
