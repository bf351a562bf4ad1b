from __future__ import annotations

import sympy
from hypothesis import given
from hypothesis import strategies as st

from dit_opt.facts.axes import axis_of, join, unify
from dit_opt.facts.token_axes import TokenAxes


def axis(n):
    return axis_of(sympy.Integer(n))


T, H, W = axis(2), axis(3), axis(5)
VIDEO = T + H + W


def test_a_run_is_found_whole_and_in_order_only():
    run = TokenAxes(VIDEO)
    assert run.length == 30
    assert run.count(VIDEO) == 1 and not run.is_torn(VIDEO)
    for torn in (T, H + W, T + W + H, W + H + T):
        assert run.count(torn) == 0 and run.is_torn(torn)
    other = axis(2) + axis(3) + axis(5)
    assert run.count(other) == 0 and not run.is_torn(other)
    assert run.count(()) == 0 and not run.touches(())


def test_a_run_with_a_piece_of_another_is_torn():
    run = TokenAxes(VIDEO)
    assert run.count(VIDEO + W) == 1 and run.is_torn(VIDEO + W)
    assert run.count(axis(4) + VIDEO) == 1 and not run.is_torn(axis(4) + VIDEO)


def test_a_run_in_a_concatenation():
    run, text = TokenAxes(VIDEO), axis(7)
    joint = join([text, VIDEO])
    assert run.count(joint) == 1 and not run.is_torn(joint)
    assert run.starts(joint) == (7,)
    assert run.starts(join([VIDEO, text, VIDEO])) == (0, 37)
    assert run.starts(VIDEO) == (0,)
    assert run.is_torn(join([text, H + W]))


def test_a_run_among_other_factors_has_no_start():
    run = TokenAxes(VIDEO)
    assert run.starts(axis(4) + VIDEO) is None
    assert run.starts(join([axis(7), axis(4) + VIDEO])) is None


def test_a_concatenation_inside_of_the_run_is_compared_by_its_parts():
    first, rest = axis(1 + 1), axis(4)
    run = TokenAxes(join([first, rest]) + W)
    assert run.count(join([first, rest]) + W) == 1
    assert run.count(join([first, axis(4)]) + W) == 0


def test_runs_are_equal_by_identity_of_axes_after_unification():
    packed = axis(30)
    assert TokenAxes(packed) != TokenAxes(VIDEO)
    twin = axis(2) + axis(3) + axis(5)
    flat = axis(30)
    assert unify(flat, twin)
    assert TokenAxes(flat) == TokenAxes(twin) != TokenAxes(VIDEO)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=6))
def test_starts_are_where_the_segments_are(kinds):
    run = TokenAxes(VIDEO)
    parts, wanted, at = [], [], 0
    for video in kinds:
        parts.append(VIDEO if video else axis(3))
        wanted += [at] if video else []
        at += 30 if video else 3
    joint = join(parts)
    assert run.starts(joint) == tuple(wanted)
    assert run.count(joint) == len(wanted)
