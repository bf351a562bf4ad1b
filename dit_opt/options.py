"""What a user may ask of ditopt, checked once.

A typo or a contradiction is an error, never a no-op.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_opt import routers
from dit_opt._compat import expand_mode, inductor_settings

DEFAULT_QUALITY = 0.9
# This and the densities of routers are careful: smaller ones suit some models and spoil others.
DEFAULT_DENSE_STEPS = 0.2
DEFAULT_REFRESH_EVERY = 10

TAILS = ("drop", "centroid")
ON_NO_MATCH = ("warn", "error", "ignore")

# Promised by the design, not written yet: asking for one must not look like a typo.
RESERVED_OPTIONS = (
    "hoist",
    "memory_budget",
    "quantize",
    "release_weights",
)


class OptionError(ValueError):
    """An option that is unknown, of the wrong type, out of range or at odds with another one."""


# The options of passes that have a frozen dataclass of their own, by the name of the pass.
_PASS_OPTIONS: dict[str, type] = {}


def register_options(name: str, kind: type) -> None:
    """Let `options={name: ...}` hold options of a pass: True, a dict, or an object of `kind`."""
    _PASS_OPTIONS[name] = kind


@dataclass(frozen=True)
class Options:
    """The options of one compilation. Hashable and comparable.

    Attributes:
        router: how blocks are chosen: `auto` (the measured best), `dense` (replace nothing),
            `rainfusion` (a pattern for each head), `adaspa` (search by exact softmax mass of one
            row in sixteen), `subblock` and `sol` (search by pooled tokens, fine and coarse),
            `headwise` (an order of the tokens for each head, and a search in it),
            `frame_tile` (own and reference frames) or `oracle` (`headwise` by every row, as slow
            as dense attention: for measuring).
        density: mean kept share of the score matrix over sparse steps, in (0, 1]; 1 keeps
            everything through the sparse kernel. What heads get because a check caught them comes
            on top. Excludes `quality`. Where neither is given, routers that have a density of
            their own keep that, others aim at a quality. 0.125 with `dense_steps=0` is faster, and
            spoils some models.
        quality: kept softmax mass to aim at, per head, in (0, 1).
        tail: what stands in for dropped blocks: `drop`, which is nothing, or `centroid`, their
            mean key and value.
        dense_steps: steps at the start of a trajectory that stay dense: an int counts steps, a
            float in [0, 1] is a share of the noise range (0.2: while the noise level is above 0.8),
            and so at least one step unless it is 0. None takes the default share. A graph that
            nothing tells the step stays dense in every call, with a warning, unless this is 0.
        refresh_every: steps between two searches for a plan; None takes the default where plans can
            be told apart by layer, and searches in each step elsewhere.
        verify_every: steps between two checks of plans on a few rows, in between searches and at
            each of them; a head whose plan keeps too little runs dense at once, and is searched
            anew with a larger budget in the next step. None checks nothing.
        verify: run dense attention beside every sparse one and report the difference of each layer
            and step, for finding out what to keep dense. Slow.
        min_tokens: sites with fewer keys stay dense; None asks the cost model.
        fuse: normalise and rotate the queries and keys of sparse attention by one kernel, on GPUs.
            Not measured on one yet, hence off.
        grid: (T, H, W) in tokens, for graphs that cannot tell.
        on_no_match: what to do where no site could be replaced.
        dump: folder for the graphs before and after each pass; by default `DITOPT_DUMP` of the
            environment.
        mode: a `torch.compile` mode, handed on to Inductor.
        inductor: Inductor settings, handed on; they win over `mode`.
        passes: (name, options) of the passes that have options of their own and are asked for.

    Raises:
        OptionError: see there. The message names the option, its value and the way out.
    """

    router: str = "auto"
    density: float | None = None
    quality: float | None = None
    tail: str = "drop"
    dense_steps: int | float | None = None
    refresh_every: int | None = None
    verify_every: int | None = None
    verify: bool = False
    min_tokens: int | None = None
    fuse: bool = False
    grid: tuple[int, int, int] | None = None
    on_no_match: str = "warn"
    dump: str | None = field(default_factory=lambda: os.environ.get("DITOPT_DUMP") or None)
    mode: str | None = None
    # Its values may be unhashable; equal options still hash alike.
    inductor: Mapping[str, Any] | None = field(default=None, hash=False)
    passes: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            # The only write to a frozen instance: the value in its plain form (a list as a tuple).
            object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_together()

    @classmethod
    def parse(cls, mapping: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Options from what `torch.compile` hands to a backend: its `options=` or its `mode=`.

        Raises:
            OptionError: an unknown or reserved key, or a value that `Options` refuses.
        """
        values = dict(mapping or {})
        found = {name: values.pop(name) for name in _PASS_OPTIONS if name in values}
        for key in values:
            _check_name(key)
        parsed = ((name, _parse_pass(name, value)) for name, value in sorted(found.items()))
        values["passes"] = tuple(item for item in parsed if item[1] is not None)
        if mode is not None:
            if values.get("mode", mode) != mode:
                raise OptionError(
                    f"Option 'mode' is {values['mode']!r}, but torch.compile was given "
                    f"mode={mode!r}. Give the mode once."
                )
            values["mode"] = mode
        return cls(**values)

    def of_pass(self, name: str) -> Any:
        """The options of a pass that has its own; None where it is not asked for."""
        return dict(self.passes).get(name)

    @property
    def effective_density(self) -> float | None:
        """The density to keep; None where `quality` decides instead."""
        if self.density is None and self.quality is None and self.router != "dense":
            return routers.find_router(self.router).density
        return self.density

    @property
    def effective_quality(self) -> float | None:
        """The softmax mass to aim at; None where `density` decides instead."""
        if self.effective_density is not None:
            return None
        return DEFAULT_QUALITY if self.quality is None else self.quality

    @property
    def effective_dense_steps(self) -> int | float:
        """`dense_steps`, or its default."""
        return DEFAULT_DENSE_STEPS if self.dense_steps is None else self.dense_steps

    @property
    def effective_refresh_every(self) -> int:
        """`refresh_every`, or its default."""
        return DEFAULT_REFRESH_EVERY if self.refresh_every is None else self.refresh_every

    def inductor_patches(self) -> dict[str, Any]:
        """What to patch Inductor's configuration with."""
        return {**(expand_mode(self.mode) if self.mode else {}), **(self.inductor or {})}

    def _check_together(self) -> None:
        if self.density is not None and self.quality is not None:
            raise OptionError(
                f"Options 'density' ({self.density}) and 'quality' ({self.quality}) both say how "
                "much to keep. Give one of them."
            )
        measures = self.router == "dense" or routers.find_router(self.router).knows_recall
        if not measures and self.quality is not None:
            raise OptionError(
                f"Option 'quality' is {self.quality}, but router={self.router!r} knows no softmax "
                "mass. Give 'density' instead, or choose another router."
            )
        for name in ("density", "quality"):
            value = getattr(self, name)
            if self.router == "dense" and value is not None:
                raise OptionError(
                    f"Option {name!r} is {value}, but router='dense' replaces nothing. Remove "
                    f"{name!r}, or choose another router, or router='auto' with density=1."
                )


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from `name=value` pairs; values are Python literals, or else text.

    Raises OptionError for a pair without `=`.
    """
    options = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise OptionError(f"Option {pair!r} must be written name=value, as quality=0.95.")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def _parse_pass(name: str, value: Any) -> Any:
    """The options of a pass as an object of its class; None where they switch it off."""
    kind = _PASS_OPTIONS[name]
    if value is None or value is False:
        return None
    if value is True:
        return kind()
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise _refuse(name, value, f"True, False, a dict, or a {kind.__name__}")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(
                f"Option {name!r} has {key!r}, which is none of its own: {', '.join(known)}.{hint}"
            )
    return kind(**value)


def _check_name(key: Any) -> None:
    names = [f.name for f in dataclasses.fields(Options) if f.name != "passes"]
    names += list(_PASS_OPTIONS)
    if key in names:
        return
    if key in RESERVED_OPTIONS:
        raise OptionError(
            f"Option {key!r} is not in this version of ditopt. Remove it; the options are "
            f"{', '.join(names)}."
        )
    near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
    raise OptionError(
        f"Unknown option {key!r}. Did you mean {near[0]!r}? The options are {', '.join(names)}."
    )


def _refuse(name: str, value: Any, expected: str) -> OptionError:
    return OptionError(f"Option {name!r} is {value!r}; it must be {expected}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def list_routers() -> tuple[str, ...]:
    """What the option `router` may name."""
    return ("auto", "dense", *(router.name for router in routers.ROUTERS))


def _check_choice(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        expected = f"one of {', '.join(map(repr, choices))}"
        if isinstance(value, str) and value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise _refuse(name, value, expected + (f" (did you mean {near[0]!r}?)" if near else ""))

    return check


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The check of an option that need not be given; its message says so itself."""
    return lambda name, value: None if value is None else check(name, value)


def _check_share(one_allowed: bool) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        number = _is_int(value) or isinstance(value, float)
        if not number or not 0 < value <= 1 or (value == 1 and not one_allowed):
            end = "]" if one_allowed else ")"
            hint = "" if one_allowed else " (to keep everything, set density=1)"
            raise _refuse(name, value, f"a number in (0, 1{end}, or None{hint}")
        return float(value)

    return check


def _check_dense_steps(name: str, value: Any) -> int | float:
    if (_is_int(value) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1):
        return value
    raise _refuse(
        name,
        value,
        "a number of steps (an int >= 0), a share of the noise range (a float in [0, 1]), or None",
    )


def _check_int(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, int) and _is_int(value) and value >= least:
            return value
        raise _refuse(name, value, f"an int >= {least}, or None")

    return check


def _check_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _refuse(name, value, "True or False")


def _check_grid(name: str, value: Any) -> tuple[int, int, int]:
    if (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and all(_is_int(size) and size > 0 for size in value)
    ):
        return value[0], value[1], value[2]
    raise _refuse(name, value, "three positive ints (T, H, W) in tokens, or None")


def _check_dump(name: str, value: Any) -> str:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return str(os.fspath(value))
    raise _refuse(name, value, "the path of a folder, or None")


def _check_mode(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _refuse(name, value, "the name of a torch.compile mode, or None")
    try:
        expand_mode(value)
    except ValueError as error:
        raise OptionError(f"Option {name!r}: {error}.") from error
    return value


def _check_inductor(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _refuse(name, value, "a dict of Inductor settings, or None")
    settings = inductor_settings()
    for key in value:
        # torch.compile(options=...) takes dashes too
        if str(key).replace("-", "_") not in settings:
            near = difflib.get_close_matches(str(key), settings, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"Option {name!r} has {key!r}, which is no Inductor setting.{hint}")
    return {str(key).replace("-", "_"): v for key, v in value.items()}


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    # routers may be added later
    "router": lambda name, value: _check_choice(list_routers())(name, value),
    "density": _or_none(_check_share(one_allowed=True)),
    "quality": _or_none(_check_share(one_allowed=False)),
    "tail": _check_choice(TAILS),
    "dense_steps": _or_none(_check_dense_steps),
    "refresh_every": _or_none(_check_int(1)),
    "verify_every": _or_none(_check_int(1)),
    "verify": _check_bool,
    "min_tokens": _or_none(_check_int(0)),
    "fuse": _check_bool,
    "grid": _or_none(_check_grid),
    "on_no_match": _check_choice(ON_NO_MATCH),
    "dump": _or_none(_check_dump),
    "mode": _or_none(_check_mode),
    "inductor": _or_none(_check_inductor),
}
