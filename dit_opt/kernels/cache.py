"""Where ditopt keeps what was measured or built on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def find_cache() -> Path:
    """$DITOPT_CACHE_DIR, or ~/.cache/ditopt. RuntimeError where nobody knows the home."""
    folder = os.environ.get("DITOPT_CACHE_DIR")
    return Path(folder) if folder else Path.home() / ".cache" / "ditopt"
