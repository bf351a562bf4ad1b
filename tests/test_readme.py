"""The README names options, reasons and commands that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from typer.testing import CliRunner

from dit_opt.cli import app
from dit_opt.decisions import AttentionReason
from dit_opt.options import (
    DEFAULT_DENSE_STEPS,
    DEFAULT_QUALITY,
    DEFAULT_REFRESH_EVERY,
    Options,
    list_routers,
)
from dit_opt.routers import AUTO, ROUTERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_option_is_in_the_table():
    table = README[README.index("### Options") : README.index("### Routers")]
    assert list_first_column(table) == {f.name for f in dataclasses.fields(Options)} - {"passes"}


def test_the_defaults_are_those_of_the_options():
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \| ", README, re.M))
    assert rows["dense_steps"] == str(DEFAULT_DENSE_STEPS)
    assert rows["refresh_every"] == str(DEFAULT_REFRESH_EVERY)
    (kept,) = re.findall(
        r"([^.,]*, [^.,]*) keep a density of 1/4; the others keep a quality", README
    )
    densities = {router.name: router.density for router in ROUTERS if router.density}
    assert dict.fromkeys(re.findall(r"`(\w+)`", kept), 0.25) == densities
    assert f"the others keep a quality\nof {DEFAULT_QUALITY}." in README


def test_every_router_is_in_the_table():
    table = README[README.index("### Routers") : README.index("## What it is measured")]
    assert list_first_column(table) == set(list_routers())
    assert f"| `auto` | `{AUTO}`" in table


def list_first_column(table):
    named = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        named |= set(re.findall(r"`(\w+)`", row))
    return named


def test_every_reason_named_exists():
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+|CAUSAL|DROPOUT|FLEX)`", README)) - {"DITOPT_DUMP"}
    assert named and named <= set(AttentionReason.__members__)


def test_flags_and_files_named_exist():
    help_text = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).stdout
    section = README[README.index("## Try it") : README.index("## Use it")]
    for flag in set(re.findall(r"`(--\w+)`", section)):
        assert flag in help_text
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists()
