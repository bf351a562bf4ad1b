"""Only a tiling that is right and faster replaces the table's, and only where it was measured."""

from __future__ import annotations

import json
import logging

import pytest
import torch

pytest.importorskip("triton")

from dit_opt.kernels.block_sparse_attention.impl.triton import tuning
from dit_opt.kernels.block_sparse_attention.impl.triton.tilings import Tiling

TABLE, FAST, WRONG, BROKEN = (Tiling(128, 64, 8, stages) for stages in (3, 5, 2, 4))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DITOPT_CACHE_DIR", str(tmp_path / "new"))
    tuning.find_tiling.cache_clear()
    yield tmp_path / "new"
    tuning.find_tiling.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """Pretends that there is a GPU of a name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    return torch.device("cuda", 0)


def test_candidates_are_checked_and_timed():
    x = torch.randn(64)

    def attend(tiling):
        if tiling is BROKEN:
            raise RuntimeError("out of resources\nand more")
        return x * (1.5 if tiling is WRONG else 1 + 1e-3 * (tiling is FAST))

    times = iter([2.0, 1.0])

    def measure(call):
        call()
        return next(times)

    trials = tuning.try_candidates(TABLE, [FAST, TABLE, WRONG, BROKEN], attend, measure)
    assert [t.tiling for t in trials] == [TABLE, FAST, WRONG, BROKEN]
    assert [t.milliseconds for t in trials] == [2.0, 1.0, None, None]
    assert trials[2].refused == "its output is 0.5 off"
    assert trials[3].refused == "RuntimeError: out of resources"
    assert tuning.choose_fastest(trials) == FAST


def test_noise_does_not_choose():
    trials = [tuning.Trial(TABLE, 1.0), tuning.Trial(FAST, 0.995)]
    assert tuning.choose_fastest(trials) == TABLE


def test_a_measured_tiling_is_found_again(folder, card):
    key = tuning.make_key("a card", 96, torch.bfloat16, 128, 64)
    assert tuning.find_tiling(card, 96, torch.bfloat16, 128, 64) is None
    assert tuning.store({key: FAST}) == folder / "tilings.json"
    tuning.store({tuning.make_key("a card", 64, torch.bfloat16, 128, 64): TABLE})
    assert tuning.find_tiling(card, 96, torch.bfloat16, 128, 64) == FAST
    # heads are padded, so this one runs the same code
    assert tuning.find_tiling(card, 128, torch.bfloat16, 128, 64) == FAST
    for other in ((96, torch.float16, 128, 64), (96, torch.bfloat16, 128, 128)):
        assert tuning.find_tiling(card, *other) is None
    assert [f.name for f in folder.iterdir()] == ["tilings.json"]


def test_a_variant_serves_the_heads_that_it_was_measured_for(folder, card):
    key = tuning.make_key("a card", 128, torch.bfloat16, 128, 64)
    variant = Tiling(128, 64, 4, 3, "gluon")
    tuning.store({key: variant})
    assert tuning.find_tiling(card, 128, torch.bfloat16, 128, 64) == variant
    # which have to be padded
    assert tuning.find_tiling(card, 96, torch.bfloat16, 128, 64) is None


def test_a_file_from_before_there_were_variants_is_read(folder, card):
    folder.mkdir()
    key = tuning.make_key("a card", 64, torch.bfloat16, 128, 64)
    entry = {"tile_q": 128, "tile_k": 64, "num_warps": 8, "num_stages": 5}
    (folder / "tilings.json").write_text(json.dumps({key: entry}))
    assert tuning.find_tiling(card, 64, torch.bfloat16, 128, 64) == FAST
    assert FAST.variant == "plain"


@pytest.mark.parametrize("change", ["card", "triton", "kernel"])
def test_a_measurement_holds_for_one_card_compiler_and_kernel(folder, card, change, monkeypatch):
    tuning.store({tuning.make_key("a card", 64, torch.bfloat16, 128, 64): FAST})
    if change == "card":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
    elif change == "triton":
        monkeypatch.setattr(tuning.triton, "__version__", "0.1")
    else:
        monkeypatch.setattr(tuning, "_hash_kernel", lambda: "edited")
    assert tuning.find_tiling(card, 64, torch.bfloat16, 128, 64) is None


def test_a_processor_has_no_measured_tiling(folder):
    tuning.store({tuning.make_key("cpu", 64, torch.float32, 128, 64): FAST})
    assert tuning.find_tiling(torch.device("cpu"), 64, torch.float32, 128, 64) is None


UNKNOWN = {"tile_q": 128, "tile_k": 64, "num_warps": 8, "num_stages": 3, "variant": "other"}
DAMAGED = [b"{", b"[1]", json.dumps({"key": {"tile": 1}}).encode(), b"\xff", None]
DAMAGED.append(json.dumps({"key": UNKNOWN}).encode())


@pytest.mark.parametrize("content", DAMAGED, ids=str)
def test_a_damaged_file_leaves_the_table(folder, card, content, caplog):
    file = folder / "tilings.json"
    if content is None:
        file.mkdir(parents=True)
    else:
        folder.mkdir()
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert tuning.find_tiling(card, 64, torch.bfloat16, 128, 64) is None
    assert "ditopt tune" in caplog.text


def test_without_a_home_the_table_serves(card, monkeypatch, caplog):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    tuning.find_tiling.cache_clear()
    monkeypatch.delenv("DITOPT_CACHE_DIR", raising=False)
    monkeypatch.setattr(tuning.Path, "home", fail)
    assert tuning.find_tiling(card, 64, torch.bfloat16, 128, 64) is None
    assert "home directory" in caplog.text
    tuning.find_tiling.cache_clear()


def test_a_file_is_looked_up_once(folder, card, monkeypatch):
    tuning.store({tuning.make_key("a card", 64, torch.bfloat16, 128, 64): FAST})
    found = [tuning.find_tiling(card, 64, torch.bfloat16, 128, 64)]
    monkeypatch.setattr(tuning, "_read", lambda: pytest.fail("read again"))
    found.append(tuning.find_tiling(card, 64, torch.bfloat16, 128, 64))
    assert found == [FAST, FAST]


def test_a_table_that_is_not_finite_serves_no_comparison():
    with pytest.raises(RuntimeError, match="not finite"):
        tuning.try_candidates(TABLE, [FAST], lambda t: torch.tensor([torch.nan]), lambda call: 1.0)
