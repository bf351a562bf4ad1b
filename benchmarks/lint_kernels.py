"""What do the shipped Triton kernels compile to? Needs no GPU.

Prints registers, shared memory, spills and instruction counts of every shipped configuration for
every target, and exits with status 1 if one of them may not ship.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tabulate
import torch
import triton

from dit_opt.kernels.aot import TARGETS, check_builds
from dit_opt.kernels.block_sparse_attention.experimental.builds import list_builds as list_variants
from dit_opt.kernels.block_sparse_attention.impl.triton.builds import list_builds as list_attention
from dit_opt.kernels.norm_rope.impl.triton.builds import list_builds as list_norm_rope
from dit_opt.kernels.searches.builds import list_builds as list_searches
from dit_opt.kernels.token_order.impl.triton.builds import list_builds as list_token_order

# Every list of builds that ship.
LISTS = (list_attention, list_variants, list_searches, list_norm_rope, list_token_order)

HEADERS = {
    "target": "target",
    "config": "configuration",
    "registers": "registers",
    "spill_bytes": "spills (B)",
    "shared_bytes": "shared (B)",
    "wgmma": "HGMMA",
    "tma_loads": "UTMALDG",
    "mma_sync": "MMA",
    "serialized": "warnings",
    "has_roles": "roles",
    "faults": "faults",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, lint, print; the exit status is 1 when a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)

    builds = [build for target in options.targets for listed in LISTS for build in listed(target)]
    rows = []
    for _, report, faults in check_builds(builds, options.processes):
        rows.append(dataclasses.asdict(report) | {"faults": faults})
    print(tabulate.tabulate([_as_text(row) for row in rows], headers=HEADERS))
    failed = sum(bool(row["faults"]) for row in rows)
    print(f"\n{len(rows)} kernels compiled with Triton {triton.__version__}, {failed} with faults.")
    if options.json is not None:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        options.json.write_text(json.dumps({"versions": versions, "kernels": rows}, indent=2))
    return 1 if failed else 0


def _as_text(row: dict[str, object]) -> dict[str, object]:
    joined = {key: ", ".join(row[key]) for key in ("serialized", "faults")}  # pyright: ignore
    return {key: (row | joined)[key] for key in HEADERS}


if __name__ == "__main__":
    sys.exit(main())
