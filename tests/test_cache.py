"""A second process finds compiled graphs in Inductor's cache, and still knows what was decided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import hashlib, json, torch
import dit_opt
from dit_opt.backend import ditopt
from zoo.small import wan

torch.set_num_threads(1)
tiny = wan(grid=(4, 12, 16), layers=1)
options = {"density": 0.6, "min_tokens": 0, "dense_steps": 0}
out = tiny(torch.compile(tiny.model, backend=ditopt, fullgraph=True, options=options))
report = json.loads(dit_opt.report(tiny.model).to_json())
(graph,) = report["graphs"]
print(json.dumps({
    "warm": graph["warm"],
    "replaced": sum(d["replaced"] for d in graph["decisions"]),
    "density": report["density"],
    "output": hashlib.sha256(out.numpy().tobytes()).hexdigest(),
}))
"""


def run(cache: Path) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_is_warm_and_says_the_same(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert (first.pop("warm"), second.pop("warm")) == (False, True)
    assert first == second
    assert first["replaced"] == 1 and 0 < first["density"] < 1
