"""The library of C++ kernels is built once, and what fails is said once."""

from __future__ import annotations

import logging
import shutil
import stat

import pytest
import torch

from dit_opt.kernels.cpp import build as module
from dit_opt.kernels.cpp.build import BuildError, build, find_compiler, load_library
from tests.kernels.block_sparse_attention.plans import Case, make_inputs

has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"
)


@pytest.fixture
def anew():
    """What was loaded stays as it was."""
    module._load.cache_clear()
    yield
    module._load.cache_clear()


@has_compiler
def test_it_is_built_once(tmp_path, monkeypatch):
    compiler = find_compiler()
    file = build(compiler, tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == [file.name]
    run, commands = module._run, []
    monkeypatch.setattr(module, "_run", lambda command: commands.append(command) or run(command))
    assert build(compiler, tmp_path) == file
    assert commands == [[compiler, "--version"]]


@has_compiler
def test_another_processor_and_other_sources_have_a_library_of_their_own(tmp_path, monkeypatch):
    compiler = find_compiler()
    copies = tmp_path / "sources"
    copies.mkdir()
    for file in (*module.SOURCES.rglob("*.h"), *module.SOURCES.rglob("*.cpp")):
        shutil.copy(file, copies)
    made = []
    run = module._run
    monkeypatch.setattr(module, "SOURCES", copies)

    def compile_nothing(command):
        if "-o" in command:
            made.append(command[-1])
            open(command[-1], "w").close()
            return ""
        return run(command)

    monkeypatch.setattr(module, "_run", compile_nothing)
    names = {build(compiler, tmp_path).name}
    monkeypatch.setattr(module, "_describe_cpu", lambda: "flags : mmx")
    names.add(build(compiler, tmp_path).name)
    with open(copies / "tiles.h", "a") as header:
        header.write("// another state\n")
    names.add(build(compiler, tmp_path).name)
    assert len(names) == len(made) == 3


def test_without_a_compiler_it_is_said_what_to_do(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match=r"install g\+\+"):
        find_compiler()


@pytest.mark.parametrize("script", ["exit 3", "echo no such header >&2; exit 1"])
def test_where_it_cannot_be_built_torch_attends_and_one_warning_says_so(
    tmp_path, monkeypatch, caplog, anew, script
):
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    arguments = make_inputs(Case(dim=64))
    expected = torch.ops.ditopt.block_sparse_attention_v3(*arguments)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path / "cache"))
    module._load.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = torch.ops.ditopt.block_sparse_attention_v3(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert load_library() is None
    (record,) = [r for r in caplog.records if r.name == module.log.name]
    assert "twice as long" in record.message and "failed with status" in record.message


def test_it_can_be_switched_off(monkeypatch, anew):
    monkeypatch.setenv(module.SWITCH, "0")
    assert load_library() is None


@has_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, anew):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path / "file"))
    assert load_library() is not None
