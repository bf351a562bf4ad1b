"""Imports point one way, and private torch names stay in one file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dit_opt

ROOT = Path(dit_opt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What the code of each room may import besides itself: rooms that stand above it.
ALLOWED = {
    "_compat": set(),
    "decisions": set(),
    "kernels": set(),
    "facts": {"_compat", "decisions"},
    "program": {"_compat", "facts"},
    "routers": {"kernels", "program"},
    "options": {"_compat", "routers"},
    "policy": {"_compat", "decisions", "facts", "options", "program", "routers"},
    "passes": {"decisions", "facts", "kernels", "options", "policy", "program", "routers"},
    "runtime": {"_compat", "program"},
    "model_probe": {"facts"},
    "tuning": {"kernels"},
    "inspect": {
        *("_compat", "decisions", "facts", "kernels", "options", "passes", "program"),
        *("routers", "runtime"),
    },
    "backend": {
        *("decisions", "facts", "inspect", "kernels", "options", "passes", "program", "runtime"),
    },
    "pipeline": {"_compat", "model_probe", "options", "runtime"},
    "demo": {"_compat", "inspect", "options", "passes", "program", "runtime"},
    "cli": {"demo", "options", "tuning"},
    "__init__": {"backend", "inspect", "options", "pipeline"},
    "__main__": {"cli"},
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


def test_no_two_rooms_can_import_each_other():
    rooms = list(ALLOWED)
    for room, allowed in ALLOWED.items():
        assert allowed <= set(rooms[: rooms.index(room)]), room


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = room_of(path)
    allowed = ALLOWED[room] | {room}
    for name, line in imports_of(path):
        if name.startswith("dit_opt.") and name != "dit_opt.__version__":
            imported = name.split(".")[1]
            assert imported in allowed, f"{path}:{line} {room} must not import {name}"


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
