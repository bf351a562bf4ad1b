"""The tilings that ran fastest on a GPU, measured once and kept on disk.

Nothing is measured while a model runs: `ditopt tune` does it, and calls look its results up. They
hold for one GPU, one Triton and one state of the kernel; without them the static table serves.
The file is `tilings.json` in $DITOPT_CACHE_DIR, or in ~/.cache/ditopt.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling, pad_dim
from dit_opt.kernels.cache import find_cache

log = logging.getLogger(__name__)

# By how much a candidate must beat the table's own tiling, so that noise does not choose.
MARGIN = 1.01
# Largest relative difference of the outputs by two tilings, which sum in another order weights and
# values that bfloat16 rounds by 1e-3 on average.
TOLERANCE = 5e-3
# Files without code of the kernels: their edits keep measured tilings valid.
_HOST_FILES = ("builds.py", "candidates.py", "tilings.py", "tuning.py")


@dataclass(frozen=True)
class Trial:
    """The time of one candidate, or why it was not timed."""

    tiling: Tiling
    milliseconds: float | None
    refused: str = ""


def find_file() -> Path:
    """Where tilings are kept."""
    return find_cache() / "tilings.json"


def make_key(device_name: str, dim: int, dtype: torch.dtype, block_q: int, block_k: int) -> str:
    """The GPU, the compiler, the state of the kernel and the shape that a measurement holds for."""
    shape = f"D={pad_dim(dim)} {str(dtype).removeprefix('torch.')} {block_q}x{block_k}"
    return f"{device_name} | triton {triton.__version__} | kernel {_hash_kernel()} | {shape}"


@functools.lru_cache(maxsize=256)
def find_tiling(
    device: torch.device, dim: int, dtype: torch.dtype, block_q: int, block_k: int
) -> Tiling | None:
    """The tiling that was measured to be the fastest on this GPU, None without a measurement.

    Looked up once in a process, since every call asks, and again after `store`. Heads that have to
    be padded share the tilings of the plain kernel only, which alone pads them.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = _read().get(make_key(name, dim, dtype, block_q, block_k))
    if found is not None and found.variant != "plain" and dim != pad_dim(dim):
        return None
    return found


def try_candidates(
    default: Tiling,
    candidates: list[Tiling],
    attend: Callable[[Tiling], Tensor],
    measure: Callable[[Callable[[], object]], float],
) -> list[Trial]:
    """Each tiling's time, that of the table first; no time for one that is wrong or fails.

    Args:
        attend: the output by a tiling. measure: milliseconds of a call.

    Raises RuntimeError where the table's own tiling gives an output that is not finite.
    """
    expected = attend(default).float()
    if not expected.isfinite().all():
        raise RuntimeError(
            f"The output by {default}, the table's own tiling, is not finite, so no candidate can "
            "be compared with it; run `pytest tests/kernels` on this GPU."
        )
    trials = [Trial(default, measure(lambda: attend(default)))]
    for tiling in candidates:
        if tiling == default:
            continue
        try:
            out = attend(tiling).float()
        except Exception as error:
            log.warning("Tiling %s was refused: %s", tiling, error)
            trials.append(Trial(tiling, None, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        off = float((out - expected).norm() / expected.norm())
        if off <= TOLERANCE:
            trials.append(Trial(tiling, measure(functools.partial(attend, tiling))))
        else:
            trials.append(Trial(tiling, None, f"its output is {off:.3g} off"))
    return trials


def choose_fastest(trials: list[Trial]) -> Tiling:
    """The first trial's tiling, unless another one is faster by more than noise."""
    timed = [(t.milliseconds, t.tiling) for t in trials if t.milliseconds is not None]
    (first, default), *_ = timed
    best, tiling = min(timed, key=lambda entry: entry[0])
    return tiling if first > best * MARGIN else default


def store(tilings: Mapping[str, Tiling]) -> Path:
    """Add measured tilings, by `make_key`, to those on disk; the file that holds them now."""
    file = find_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {**_read(), **tilings}
    text = json.dumps({key: asdict(tiling) for key, tiling in sorted(kept.items())}, indent=1)
    # another process must never read half a file
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text + "\n")
    part.replace(file)
    find_tiling.cache_clear()
    return file


def _read() -> dict[str, Tiling]:
    """What is on disk; nothing, with a warning, where that is damaged or out of reach."""
    try:
        entries = json.loads(find_file().read_text())
        return {key: Tiling(**entry) for key, entry in entries.items()}
    except FileNotFoundError:
        return {}
    # a home that nobody knows is a RuntimeError, text that is neither JSON nor UTF-8 a ValueError
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        log.warning(
            "The measured tilings cannot be read (%s: %s), so the table serves; delete "
            "tilings.json in $DITOPT_CACHE_DIR or ~/.cache/ditopt, or run `ditopt tune`.",
            type(error).__name__,
            error,
        )
        return {}


@functools.cache
def _hash_kernel() -> str:
    """Hash of the sources that the kernels are compiled from, and of their launchers."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    parts = [*folder.glob("*.py"), *folder.parents[1].glob("experimental/*.py")]
    parts = [file for file in sorted(parts) if file.name not in _HOST_FILES]
    for file in (*parts, folder.parents[2] / "scores.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
