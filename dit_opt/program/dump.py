"""Readable graphs before and after each pass, as files and in torch's structured trace.

A wrong rewrite shows in a diff of two graphs long before it shows in an image.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.fx import GraphModule

from dit_opt._compat import emit_artifact, is_tracing

log = logging.getLogger(__name__)

_graph_numbers = itertools.count()
_lock = threading.Lock()


class Dumper:
    """Writes the graphs of one compilation.

    Into `folder` go, for each compiled graph of the process, a folder `graph_<n>` with numbered
    files: `00_capture.py`, `01_<pass>.before.py`, `01_<pass>.after.py`, `01_<pass>.diff`. The same
    texts become artifacts of torch's structured trace (TORCH_TRACE) and, with
    `TORCH_LOGS="+dit_opt"`, diffs are logged. Without a folder, trace or log nothing is rendered.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        with _lock:
            self._graph = next(_graph_numbers)
        self._steps = itertools.count()
        self._folder: Path | None = None
        if folder is not None:
            # another process may have written here before
            number = self._graph
            while (Path(folder) / f"graph_{number:02d}").exists():
                number += 1
            self._folder = Path(folder) / f"graph_{number:02d}"
            self._folder.mkdir(parents=True)

    def graph(self, name: str, gm: GraphModule) -> None:
        """Write one graph."""
        step = next(self._steps)
        if self._is_wanted():
            self._write(f"{step:02d}_{name}", ".py", _render(gm))

    @contextmanager
    def around(self, name: str, gm: GraphModule, variant: str = "") -> Iterator[None]:
        """Write `gm` as it is before and after the body, which edits it in place, and the diff.

        `variant` tells the modes of one graph apart.
        """
        stem = f"{next(self._steps):02d}_{name}" + (f".{variant}" if variant else "")
        if not self._is_wanted():
            yield
            return
        before = _render(gm)
        self._write(stem, ".before.py", before)
        yield
        after = _render(gm)
        self._write(stem, ".after.py", after)
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), "before", "after", lineterm=""
        )
        diff = "\n".join(lines)
        self._write(stem, ".diff", diff)
        log.debug("graph %d, %s:\n%s", self._graph, stem, diff or "unchanged")

    def _is_wanted(self) -> bool:
        return self._folder is not None or is_tracing() or log.isEnabledFor(logging.DEBUG)

    def _write(self, stem: str, suffix: str, text: str) -> None:
        emit_artifact(f"ditopt_{self._graph:02d}_{stem}{suffix}", text)
        if self._folder is not None:
            (self._folder / f"{stem}{suffix}").write_text(text + "\n", encoding="utf-8")


def _render(gm: GraphModule) -> str:
    """Python code with shapes, strides, devices and source lines."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)
