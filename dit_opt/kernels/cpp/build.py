"""Builds the library of C++ kernels once for a CPU, a compiler and a state of the sources.

It is kept in $DITOPT_CACHE_DIR, or in ~/.cache/ditopt. Where there is no compiler, or it fails,
torch's operators are used instead, and a warning says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from dit_opt.kernels.cache import find_cache

log = logging.getLogger(__name__)

# The folder of all kernels, each with its C++ sources; what they share is beside this file.
SOURCES = Path(__file__).parents[1]
# Environment variable; 0 disables the C++ kernels.
SWITCH = "DITOPT_NATIVE"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
_SECONDS = 120
_lock = threading.Lock()


class BuildError(RuntimeError):
    """The kernels could not be built or loaded on this machine."""


def load_library() -> ctypes.CDLL | None:
    """The kernels, built where they are not; None, after one warning, where they cannot be."""
    with _lock:
        return _load()


def build_ahead() -> None:
    """Begin to build in the background, so that the first call need not wait for it."""
    threading.Thread(target=load_library, name="ditopt-build", daemon=True).start()


@functools.cache
def _load() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return ctypes.CDLL(str(build(find_compiler(), _find_folder())))
    except (BuildError, OSError) as error:
        log.warning(
            "The C++ kernels are not used, so attention on the CPU takes about twice as long: %s",
            error,
        )
        return None


def find_compiler() -> str:
    """The C++ compiler: $CXX, or else the first of g++ and clang++. BuildError without one."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError("There is no C++ compiler; install g++, or let CXX name one.")


def build(compiler: str, folder: Path) -> Path:
    """The library's file in `folder`, compiled unless it is there. BuildError where that fails."""
    files = sorted(SOURCES.rglob("*.cpp"))
    tune = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [compiler, *_FLAGS, tune]
    digest = hashlib.sha256()
    for part in (*command, _run([compiler, "--version"]), _describe_cpu()):
        digest.update(part.encode() + b"\0")
    for file in (*sorted(SOURCES.rglob("*.h")), *files):
        digest.update(file.read_bytes())
    target = folder / f"native-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Another process must never load half a file.
    part = target.with_suffix(f".{os.getpid()}")
    _run([*command, f"-I{Path(__file__).parent}", *map(str, files), "-o", str(part)])
    part.replace(target)
    log.info("built %s", target)
    return target


def _find_folder() -> Path:
    """The cache, or a folder of this process where that cannot be written."""
    try:
        folder = find_cache()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    # A home that nobody knows is a RuntimeError.
    except (OSError, RuntimeError):
        log.debug("the cache cannot be written", exc_info=True)
    return Path(tempfile.mkdtemp(prefix="ditopt-"))


def _describe_cpu() -> str:
    """The instruction sets of the CPU; machines of several kinds may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.machine())


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(
            f"{command[0]} failed with status {done.returncode}: {done.stderr[-2000:]}"
        )
    return done.stdout
