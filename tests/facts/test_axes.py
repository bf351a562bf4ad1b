from __future__ import annotations

import itertools
import math

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_opt.facts.axes import (
    Origin,
    axis_of,
    join,
    leaves,
    regroup,
    resolve,
    segments,
    size,
    unify,
)
from dit_opt.facts.sizes import are_equal, divide

FACTORS = st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=4)
T, H, W, N = (sympy.Symbol(n, integer=True, positive=True) for n in "THWN")


def dim_of(*sizes):
    return tuple(axis for s in sizes for axis in axis_of(sympy.sympify(s)))


def sizes_of(dim):
    return [int(a.size) for a in resolve(dim)]


def shape_of(*dims):
    """Which axes of the dimensions are the same, with their sizes, whatever objects they are."""
    names = {}
    return [
        [(names.setdefault(leaf, len(names)), leaf.size) for leaf in leaves(dim)] for dim in dims
    ]


@st.composite
def two_factorisations(draw):
    """Two ways to write one number as factors: merges of neighbours of one list."""
    factors = draw(FACTORS)
    sides = []
    for _ in range(2):
        cuts = draw(st.sets(st.sampled_from(range(1, len(factors))))) if len(factors) > 1 else set()
        borders = [0, *sorted(cuts), len(factors)]
        sides.append([math.prod(factors[a:b]) for a, b in itertools.pairwise(borders)])
    return sides


@settings(max_examples=40)
@given(two_factorisations())
def test_unify_keeps_sizes_and_makes_dimensions_the_same(sides):
    x, y = dim_of(*sides[0]), dim_of(*sides[1])
    agreed = unify(x, y)
    assert size(resolve(x)) == size(resolve(y)) == math.prod(sides[0])
    if agreed:
        assert resolve(x) == resolve(y)
        assert unify(x, y)


@settings(max_examples=40)
@given(FACTORS, FACTORS)
def test_unify_is_symmetric(left, right):
    x, y, u, v = dim_of(*left), dim_of(*right), dim_of(*left), dim_of(*right)
    assert unify(x, y) == unify(v, u)
    assert shape_of(x, y) == shape_of(u, v)


@settings(max_examples=40)
@given(FACTORS, st.permutations(range(4)))
def test_axes_of_one_dimension_stay_apart(factors, order):
    x = dim_of(*factors)
    y = tuple(x[i] for i in order if i < len(x))
    unify(x, y)
    assert len(set(leaves(x))) == len(leaves(x))


@settings(max_examples=40)
@given(two_factorisations())
def test_regroup_round_trip(sides):
    x = dim_of(*sides[0])
    flat = regroup(x, [sympy.Integer(math.prod(sides[0]))])
    assert flat is not None and resolve(flat[0]) == resolve(x)
    parts = regroup(x, [sympy.Integer(s) for s in sides[1]])
    if parts is not None:
        assert [int(size(p)) for p in parts] == sides[1]
        assert tuple(a for p in parts for a in resolve(p)) == resolve(x)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.data())
def test_sums_are_cut_at_each_others_borders(lengths, data):
    total = sum(lengths)
    borders = sorted(data.draw(st.sets(st.integers(1, total - 1), min_size=1, max_size=4)))
    other = [b - a for a, b in itertools.pairwise([0, *borders, total])]
    x = join([dim_of(n) for n in lengths])
    y = join([dim_of(n) for n in other])
    assert unify(x, y)
    sizes = [int(size(p)) for p in segments(x)]
    wanted = sorted({*itertools.accumulate(lengths), *borders})
    assert list(itertools.accumulate(sizes)) == wanted
    assert [int(size(p)) for p in segments(y)] == sizes
    assert leaves(x) == leaves(y)


def test_facts_flow_backwards_from_a_table_to_packed_tokens():
    tokens, table = dim_of(60), dim_of(3, 4, 5)
    assert unify(tokens, table)
    assert sizes_of(tokens) == [3, 4, 5]
    assert resolve(tokens) == table


def test_equal_sizes_prove_nothing():
    x, y = dim_of(4), dim_of(4)
    assert resolve(x) != resolve(y)
    assert unify(x, y) and resolve(x) == resolve(y)


def test_contradicting_structures_bind_nothing():
    x, y = dim_of(4, 5), dim_of(5, 4)
    assert not unify(x, y)
    assert sizes_of(x) == [4, 5] and sizes_of(y) == [5, 4]
    assert not set(leaves(x)) & set(leaves(y))


def test_a_sum_is_one_factor():
    centred = join([dim_of(2), dim_of(2)])
    grid = (*centred, *dim_of(5))
    tokens = dim_of(20)
    assert unify(tokens, grid)
    assert sizes_of(tokens) == [4, 5]
    assert regroup(grid, [sympy.Integer(2), sympy.Integer(10)]) is None


def test_nested_sums_are_flat():
    inner = join([dim_of(2), dim_of(3)])
    assert [int(size(p)) for p in segments(join([inner, dim_of(4)]))] == [2, 3, 4]


def test_the_best_origin_wins_whichever_side_it_is_on():
    latents = Origin("hidden_states", 2, 5, 5, True, True)
    ids = Origin("img_ids", 0, 2, 2, True, True)
    for order in (1, -1):
        dims = [axis_of(sympy.Integer(60), [o]) for o in (latents, ids)][::order]
        assert unify(*dims)
        assert [leaf.origin for leaf in leaves(dims[0])] == [latents]
        assert leaves(dims[0])[0].origins == (latents, ids)


def test_symbols_are_decided_by_proof_alone():
    tokens = dim_of(T * H * W)
    assert unify(tokens, dim_of(T, H, W))
    assert [a.size for a in resolve(tokens)] == [T, H, W]
    assert not unify(dim_of(N), dim_of(T, H))
    assert not unify(dim_of(T, H), dim_of(H, T))
    assert divide(T * H, H) == T and divide(T, H) is None and divide(T, sympy.Integer(2)) is None
    assert are_equal(T * (H + 1), T * H + T) and not are_equal(T, H)


def test_symbolic_sums_meet_where_their_borders_are_proved():
    joint = join([dim_of(N), dim_of(T * H)])
    assert unify(joint, join([dim_of(N), dim_of(T, H)]))
    assert [a.size for a in leaves(joint)] == [N, T, H]
    whole = dim_of(N + T)
    assert unify(whole, join([dim_of(N), dim_of(T)]))
    assert [size(p) for p in segments(whole)] == [N, T]
    assert not unify(join([dim_of(N), dim_of(T)]), join([dim_of(T), dim_of(N)]))
