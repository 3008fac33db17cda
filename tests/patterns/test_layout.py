"""Axes as products of factors: reshapes, broadcasts, lengths."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_tricks.patterns.layout import Layout, Length, broadcast, length_of, regroup

B, T = "#0", "#1"
X: Layout = ((B,), (T,), (48,))


def lengths(*axes: object) -> list[Length | None]:
    """Lengths by hand: a number, a symbol, a tuple of both, or None."""
    found: list[Length | None] = []
    for axis in axes:
        factors = axis if isinstance(axis, tuple) else (axis,)
        found.append(None if axis is None else length_of(factors))
    return found


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        (X, (B, T, 4, 12), ((B,), (T,), (4,), (12,))),
        (X, (B, None, 4, 12), ((B,), (T,), (4,), (12,))),
        (X, (None, 48), ((B, T), (48,))),
        (X, ((B, T), 48), ((B, T), (48,))),
        (X, (B, (T, 4), 12), ((B,), (T, 4), (12,))),
        (X, (B, 1, T, 48), ((B,), (), (T,), (48,))),
        (((B,), (T, 4), (12,)), (B, T, None), X),
        (((B, T), (48,)), (B, T, 48), X),
        (X, (T, B, 48), None),
        (X, (None, None, 48), None),
        (X, (B, T, 5, None), None),
        (X, (B, T, 7), None),
        (((B,), (48,), (T,)), (B, T, 48), None),
    ],
)
def test_a_reshape_regroups_factors_or_cannot_be_told(before, wanted, after) -> None:
    assert regroup(before, lengths(*wanted), {}) == after


@pytest.mark.parametrize(
    ("wanted", "after"),
    [
        ((1, 8, 4, 12), ((B,), (T,), (4,), (12,))),
        ((8, 48), ((B, T), (48,))),
        ((T, 48), ((B, T), (48,))),
        ((1, 6, 64), None),
    ],
)
def test_lengths_that_the_model_fixes_stand_for_their_symbols(wanted, after) -> None:
    assert regroup(X, lengths(*wanted), {B: 1, T: 8}) == after


@pytest.mark.parametrize(
    ("wanted", "after"),
    [((None, T), ((B,), (T,))), ((B, 1), ((B, T), ())), ((None, 1, T), ((B,), (), (T,)))],
)
def test_an_axis_of_length_one_stands_where_it_is_asked_for_by_name(wanted, after) -> None:
    assert regroup(((B,), (T,)), lengths(*wanted), {T: 1}) == after


def test_axes_of_length_one_broadcast_and_others_have_to_be_equal() -> None:
    assert broadcast([X, ((48,),)]) == X
    assert broadcast([X, ((), (), ())]) == X
    assert broadcast([((B,), (T,), ()), ((), (48,))]) == X
    assert broadcast([X, ((5,), (48,))]) is None
    assert broadcast([X, ((T,), (48,))]) == X
    assert broadcast([((B, T), (48,)), ((T,), (48,))]) is None


def test_lengths_multiply_and_divide_only_where_that_is_whole() -> None:
    both = Length(4, (B, T))
    assert Length(2, (T,)).times(Length(2, (B,))) == both
    assert both.over(Length(2, (T,))) == Length(2, (B,))
    assert both.over(Length(3)) is None
    assert both.over(Length(1, (T, T))) is None


@given(st.lists(st.sampled_from([2, 3, 5]), min_size=1, max_size=6), st.data())
def test_any_grouping_of_the_factors_is_told(factors: list[int], data: st.DataObject) -> None:
    flat: Layout = ((B,), (T,), (math.prod(factors),))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    edges = [0, *cuts, len(factors)]
    inner = [math.prod(factors[a:b]) for a, b in itertools.pairwise(edges)]
    after = regroup(flat, lengths(B, T, *inner), {})
    assert after == ((B,), (T,), *[() if one == 1 else (one,) for one in inner])
    assert regroup(after, lengths(B, T, None), {}) == flat
