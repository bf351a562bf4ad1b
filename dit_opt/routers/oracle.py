"""`oracle`: `headwise` by every row, as slow as dense attention; to measure searches by."""

from __future__ import annotations

from dit_opt.routers.headwise import Headwise


class Oracle(Headwise):
    """Searches by the exact softmax of all rows."""

    name = "oracle"
    cell = 1
