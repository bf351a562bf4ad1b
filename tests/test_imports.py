"""Imports point one way, and private torch names stay in one file."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dit_opt

ROOT = Path(dit_opt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What the code of a room may import beside itself, from the lowest room to the highest.
ALLOWED = {
    "_compat": set(),
    "decisions": set(),
    "kernels": set(),
    "facts": {"_compat", "decisions"},
    "program": {"_compat", "facts"},
    "routers": {"kernels", "program"},
    "options": {"_compat", "routers"},
    "policy": {"_compat", "decisions", "facts", "options", "program", "routers"},
    "passes": {"decisions", "facts", "options", "policy", "program", "routers"},
    "runtime": {"_compat", "program"},
    "inspect": {
        "_compat",
        "decisions",
        "facts",
        "options",
        "passes",
        "program",
        "routers",
        "runtime",
    },
    "backend": {
        "facts",
        "inspect",
        "kernels",
        "options",
        "passes",
        "program",
        "runtime",
    },
    "model_probe": {"facts"},
    "pipeline": {"_compat", "model_probe", "options", "passes", "runtime"},
    "tuning": {"kernels"},
    "demo": {"_compat", "inspect", "options", "passes", "program", "runtime"},
    "cli": {"demo", "options", "tuning"},
    "__main__": {"cli"},
    # the public names, imported on first use
    "__init__": {"backend", "inspect", "options", "pipeline"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module, also inside functions, as a dotted name with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def test_the_walk_sees_the_package():
    assert {room_of(path) for path in FILES} == set(ALLOWED)
    assert any(name == "torch.fx.Graph" for name, _ in imports_of(ROOT / "facts" / "sites.py"))


def test_the_table_has_no_circle():
    # every arrow points to a room that stands before
    rooms = list(ALLOWED)
    for i, room in enumerate(rooms):
        assert ALLOWED[room] <= set(rooms[:i]), f"{room} imports a room that stands behind it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = room_of(path)
    assert room in ALLOWED, f"{path} is in no room of the table"
    for name, line in imports_of(path):
        if name.startswith("dit_opt.") and name != "dit_opt.__version__":
            imported = name.split(".")[1]
            allowed = ALLOWED[room] | {room}
            assert imported in allowed, f"{path}:{line} {room} must not import {name}"


def test_every_arrow_of_the_table_is_used():
    found = {room: set() for room in ALLOWED}
    for path in FILES:
        names = [n for n, _ in imports_of(path) if n.startswith("dit_opt.")]
        found[room_of(path)].update(n.split(".")[1] for n in names if n != "dit_opt.__version__")
    unused = {room: ALLOWED[room] - found[room] for room in ALLOWED if ALLOWED[room] - found[room]}
    assert not unused


def test_files_import_each_other_in_no_circle():
    """Imports inside functions count, too."""
    modules = {".".join(("dit_opt", *p.relative_to(ROOT).with_suffix("").parts)): p for p in FILES}
    arrows = {
        name: {
            target
            for imported, _ in imports_of(path)
            for target in (imported, imported.rpartition(".")[0])
            if target in modules and target != name
        }
        for name, path in modules.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(arrows).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_know_no_graph(path):
    if room_of(path) != "kernels":
        return
    for name, line in imports_of(path):
        assert not name.startswith("torch.fx"), f"{path}:{line} imports {name}"


def test_the_backend_needs_no_triton():
    # it is imported inside GPU implementations only: not every machine has it
    code = "import sys; sys.modules['triton'] = None; import dit_opt.backend, dit_opt.pipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_torch_names_have_one_home(path):
    if room_of(path) == "_compat":
        return
    for name, line in imports_of(path):
        parts = name.split(".")
        is_private = parts[0] == "torch" and any(p.startswith("_") for p in parts[1:])
        assert not is_private, f"{path}:{line} imports {name}; its home is dit_opt/_compat.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = node.value.id == "torch" and node.attr.startswith("_")
            assert not is_private or node.attr.startswith("__"), f"{path}:{node.lineno}"


def test_no_module_hides_a_public_name():
    # importing it would put the module where the function was
    assert not set(dit_opt.__all__) & {path.stem for path in ROOT.glob("*.py")}


def test_importing_the_package_is_free():
    code = "import dit_opt, sys; assert 'torch' not in sys.modules; print(dit_opt.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == dit_opt.__version__


def test_public_names():
    from dit_opt.options import Options

    assert dit_opt.Options is Options
    assert callable(dit_opt.reset) and callable(dit_opt.explain) and callable(dit_opt.report)
    assert callable(dit_opt.optimize)
    assert set(dit_opt.__all__) <= set(dir(dit_opt))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = dit_opt.optimise
