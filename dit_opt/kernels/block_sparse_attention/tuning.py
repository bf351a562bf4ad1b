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

from dit_opt.kernels.block_sparse_attention.tilings import Tiling, pad_dim

log = logging.getLogger(__name__)

# By how much a candidate must beat the table's own tiling, or noise would choose.
MARGIN = 1.01
# Of an output that another tiling computes: sums in another order, rounded to 16 bits.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Trial:
    """What became of one candidate: its time, or why it has none."""

    tiling: Tiling
    milliseconds: float | None
    refused: str = ""


def find_file() -> Path:
    """Where tilings are kept."""
    folder = os.environ.get("DITOPT_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "ditopt") / "tilings.json"


def make_key(device_name: str, dim: int, dtype: torch.dtype, block_q: int, block_k: int) -> str:
    """What a measurement holds for."""
    shape = f"D={pad_dim(dim)} {str(dtype).removeprefix('torch.')} {block_q}x{block_k}"
    return f"{device_name} | triton {triton.__version__} | kernel {_hash_kernel()} | {shape}"


def find_tiling(
    device: torch.device, dim: int, dtype: torch.dtype, block_q: int, block_k: int
) -> Tiling | None:
    """The tiling that was measured to be the fastest on this GPU, None without a measurement."""
    if device.type != "cuda":
        return None
    tilings = _read(find_file())
    if not tilings:
        return None
    name = torch.cuda.get_device_name(device)
    return tilings.get(make_key(name, dim, dtype, block_q, block_k))


def try_candidates(
    default: Tiling,
    candidates: list[Tiling],
    attend: Callable[[Tiling], Tensor],
    measure: Callable[[Callable[[], object]], float],
) -> list[Trial]:
    """Each tiling's time, that of the table first; no time for one that is wrong or fails.

    Args:
        attend: the output by a tiling. measure: milliseconds of a call.
    """
    expected = attend(default).float()
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
    kept = {**_read(file), **tilings}
    text = json.dumps({key: asdict(tiling) for key, tiling in sorted(kept.items())}, indent=1)
    # another process must never read half a file
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text + "\n")
    part.replace(file)
    _read.cache_clear()
    return file


@functools.lru_cache(maxsize=4)
def _read(file: Path) -> dict[str, Tiling]:
    if not file.exists():
        return {}
    try:
        return {key: Tiling(**entry) for key, entry in json.loads(file.read_text()).items()}
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        log.warning(
            "%s holds no tilings (%s), so the table serves; delete it, or run `ditopt tune`.",
            file,
            error,
        )
        return {}


@functools.cache
def _hash_kernel() -> str:
    """Of everything that the kernel is made of."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in (*sorted(folder.glob("triton*.py")), folder.parent / "scores.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
