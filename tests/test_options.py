from __future__ import annotations

import dataclasses

import pytest

from dit_opt.options import (
    DEFAULT_DENSE_STEPS,
    DEFAULT_QUALITY,
    DEFAULT_REFRESH_EVERY,
    RESERVED_OPTIONS,
    OptionError,
    Options,
    list_routers,
    read_options,
    register_options,
)
from dit_opt.routers import AUTO, ROUTERS, find_router


def test_defaults():
    options = Options.parse(None)
    assert options == Options()
    assert options.effective_density == find_router(AUTO).density
    assert options.effective_quality is None
    assert Options(quality=0.8).effective_density is None
    assert Options(router="rainfusion").effective_quality == DEFAULT_QUALITY
    assert options.effective_refresh_every == DEFAULT_REFRESH_EVERY
    assert options.effective_dense_steps == DEFAULT_DENSE_STEPS
    assert options.inductor_patches() == {}


def test_density_takes_the_place_of_quality():
    assert Options(density=0.5).effective_quality is None
    assert Options(quality=0.9).effective_quality == 0.9
    assert Options(dense_steps=0).effective_dense_steps == 0


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("densty", "density"),
        ("qualiti", "quality"),
        ("Grid", "grid"),
        ("denseSteps", "dense_steps"),
    ],
)
def test_unknown_option_names_the_nearest(key, nearest):
    with pytest.raises(OptionError, match=f"Unknown option '{key}'. Did you mean '{nearest}'"):
        Options.parse({key: 1})


@pytest.mark.parametrize("key", RESERVED_OPTIONS)
def test_reserved_options_are_no_typos(key):
    with pytest.raises(OptionError, match=f"'{key}' is not in this version"):
        Options.parse({key: True})


def test_a_router_without_a_recall_keeps_a_density():
    assert Options(router="frame_tile").effective_density == 0.25
    assert Options(router="frame_tile").effective_quality is None
    assert Options(router="frame_tile", density=0.4).effective_density == 0.4
    assert Options(router="subblock").effective_density is None
    with pytest.raises(OptionError, match="'quality' is 0\\.9, but router='frame_tile'"):
        Options(router="frame_tile", quality=0.9)


def test_auto_stands_for_a_router():
    assert find_router(Options().router) in ROUTERS and find_router("auto").name == AUTO
    assert find_router("sol").name == "sol"
    assert list_routers() == ("auto", "dense", *(router.name for router in ROUTERS))
    with pytest.raises(LookupError, match="did you mean 'headwise'"):
        find_router("headwize")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("router", "rainfushion"),
        ("router", None),
        ("router", 3),
        ("density", 0),
        ("density", 1.5),
        ("density", "half"),
        ("density", True),
        ("density", float("nan")),
        ("quality", 1.0),
        ("quality", 0.0),
        ("dense_steps", -1),
        ("dense_steps", 1.5),
        ("dense_steps", True),
        ("refresh_every", 0),
        ("refresh_every", 2.0),
        ("min_tokens", -1),
        ("min_tokens", 10.5),
        ("grid", (4, 5)),
        ("grid", (0, 4, 5)),
        ("grid", (1.0, 4, 5)),
        ("grid", "4x5"),
        ("on_no_match", "raise"),
        ("dump", ""),
        ("dump", 1),
        ("mode", "fastest"),
        ("mode", 1),
        ("inductor", ["max_autotune"]),
        ("inductor", {"max_autotun": True}),
    ],
)
def test_bad_values_name_key_and_value(key, value):
    with pytest.raises(OptionError) as error:
        Options.parse({key: value})
    assert repr(key) in str(error.value)
    shown = next(iter(value)) if isinstance(value, dict) else value
    assert repr(shown) in str(error.value) or str(shown) in str(error.value)


def test_near_misses_are_named():
    with pytest.raises(OptionError, match="did you mean 'rainfusion'"):
        Options(router="rainfushion")
    with pytest.raises(OptionError, match="Did you mean 'max_autotune'"):
        Options(inductor={"max_autotun": True})


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.5, "quality": 0.9},
        {"density": 1, "quality": 0.9},
        {"router": "dense", "density": 0.5},
        {"router": "dense", "quality": 0.5},
    ],
)
def test_contradictions(options):
    with pytest.raises(OptionError) as error:
        Options.parse(options)
    assert all(key in str(error.value) for key in options if key != "router")


def test_values_take_their_plain_form(tmp_path):
    options = Options(density=1, grid=[2, 3, 4], dump=tmp_path, inductor={"max-autotune": True})
    assert options.density == 1.0 and isinstance(options.density, float)
    assert options.grid == (2, 3, 4)
    assert options.dump == str(tmp_path)
    assert options.inductor_patches() == {"max_autotune": True}


def test_dump_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DITOPT_DUMP", "/tmp/graphs")
    assert Options.parse({}).dump == "/tmp/graphs"
    assert Options.parse({"dump": None}).dump is None
    monkeypatch.delenv("DITOPT_DUMP")
    assert Options.parse({}).dump is None


def test_mode_becomes_patches_and_settings_win():
    options = Options.parse({"inductor": {"max_autotune": False}}, mode="max-autotune")
    assert options.mode == "max-autotune"
    patches = options.inductor_patches()
    assert patches["max_autotune"] is False
    assert patches["coordinate_descent_tuning"] is True


def test_two_modes_contradict():
    assert Options.parse({"mode": "default"}, mode="default").mode == "default"
    with pytest.raises(OptionError, match="Give the mode once"):
        Options.parse({"mode": "default"}, mode="max-autotune")


def test_frozen_hashable_comparable():
    one = Options(density=0.5, inductor={"max_autotune": True})
    same = Options.parse({"density": 0.5, "inductor": {"max_autotune": True}})
    assert one == same and hash(one) == hash(same)
    assert one != Options(density=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.density = 0.25


def test_parse_leaves_the_mapping_alone():
    mapping = {"grid": [1, 2, 3]}
    Options.parse(mapping, mode="default")
    assert mapping == {"grid": [1, 2, 3]}


def test_options_are_literals_or_text():
    pairs = ["quality=0.95", "dense_steps=2", "router=rainfusion", "grid=(1, 2, 3)"]
    assert read_options(pairs) == {
        "quality": 0.95,
        "dense_steps": 2,
        "router": "rainfusion",
        "grid": (1, 2, 3),
    }
    with pytest.raises(OptionError, match="name=value"):
        read_options(["quality"])


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    width: int = 3


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr("dit_opt.options._PASS_OPTIONS", {})
    register_options("toy", ToyOptions)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (True, ToyOptions()),
        ({"width": 5}, ToyOptions(5)),
        (ToyOptions(7), ToyOptions(7)),
        (False, None),
        (None, None),
    ],
)
def test_options_of_a_pass_are_an_object_a_dict_or_true(toy, given, parsed):
    options = Options.parse({"toy": given, "router": "sol"})
    assert options.of_pass("toy") == parsed and options.router == "sol"
    assert hash(options) == hash(Options.parse({"toy": given, "router": "sol"}))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"widht": 5}, "did you mean 'width'|Did you mean 'width'"), (3, "a dict, or a ToyOptions")],
)
def test_wrong_options_of_a_pass_are_refused(toy, given, message):
    with pytest.raises(OptionError, match=message):
        Options.parse({"toy": given})


def test_a_pass_that_is_not_asked_for_has_no_options(toy):
    assert Options.parse({}).of_pass("toy") is None
    with pytest.raises(OptionError, match="Did you mean 'toy'"):
        Options.parse({"toi": True})
