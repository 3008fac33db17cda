"""Lengths of axes in symbols: which are told to be equal, and which are not."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_tricks.graph.shapes import annotate
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.layout import Length
from onnx_tricks.patterns.shape_rules import Lengths
from tests import toys

SIDES = "sx = Shape(x) n0 = Gather(sx, axis0) n1 = Gather(sx, axis1) n2 = Slice(sx, pair, far) "
HALVED = "f = Cast<to=1>(n1) h = Div(f, two) up = Ceil(h) d = Mul(up, two) "

EQUAL = {
    "products in any order": "p = Mul(n0, n1) q = Mul(n1, n0)",
    "a product divided": "r = Mul(n0, n1) p = Div(r, n1) q = Identity(n0)",
    "a length rounded up and halved": HALVED
    + "i = Cast<to=7>(d) j = Div(i, pair) p = Mul(j, pair) "
    "k = Ceil(h) m = Mul(two, k) q = Cast<to=7>(m)",
    "quotients of the same": "p = Div(n0, pair) q = Div(n0, pair)",
    "a value filled to a shape": "f = ConstantOfShape(n1) sf = Shape(f) p = Identity(sf) "
    "q = Identity(n1)",
    "a range counted to a length": "count = Squeeze(n1, axis0) zero_i = Sub(index, index) "
    "by = Squeeze(axis1, axis0) f = Range(zero_i, count, by) p = Shape(f) q = Identity(n1)",
    "a half of a known axis": "sx3 = Slice(x, axis0, half_width, pair) a = Shape(sx3) "
    "p = Gather(a, pair) q = Identity(half_width)",
}
UNEQUAL = {
    "two lengths": "p = Identity(n0) q = Identity(n1)",
    "a length halved and doubled": "h = Div(n1, pair) p = Mul(h, pair) q = Identity(n1)",
    "quotients rounded in two ways": "f = Cast<to=1>(n1) h = Div(f, two) up = Ceil(h) "
    "p = Cast<to=7>(up) q = Div(n1, pair)",
    "what may be -1": "p = Sub(n0, n1) q = Sub(n0, n1)",
    "what may be 0": "p = Mod(n0, pair) q = Mod(n0, pair)",
}


def shapes(body: str, *names: str) -> list[Lengths | None]:
    """The shapes of values of a toy graph."""
    given = ir.from_proto(toys.model(body, outputs=names[-1]))
    annotate(given)
    values = {one.name: one for node in given.graph for one in node.outputs}
    extents = Extents()
    return [extents.shape(values[name]) for name in names]


def test_a_map_has_its_sides_again_after_it_was_flattened() -> None:
    body = (
        SIDES + "a = Unsqueeze(x, axis1) to = Concat<axis=0>(n0, last, n2) u = Reshape(a, to) "
        "t = Transpose<perm=[0,2,1]>(u) back = Concat<axis=0>(n0, last, axis1, n1) "
        "y = Reshape(t, back)"
    )
    before, after = shapes(body, "a", "y")
    assert before is not None
    assert after == (before[0], Length(toys.D), Length(1), before[2])


@pytest.mark.parametrize("case", EQUAL)
def test_what_is_worked_out_alike_is_equal(case: str) -> None:
    first, second = shapes(SIDES + EQUAL[case] + " u = Expand(one, p) y = Expand(one, q)", "u", "y")
    assert first is not None
    assert first == second


@pytest.mark.parametrize("case", UNEQUAL)
def test_what_may_differ_is_not_equal(case: str) -> None:
    first, second = shapes(
        SIDES + UNEQUAL[case] + " u = Expand(one, p) y = Expand(one, q)", "u", "y"
    )
    assert first is not None
    assert first != second


def test_a_range_from_elsewhere_has_another_length() -> None:
    body = SIDES + "count = Squeeze(n1, axis0) by = Squeeze(axis1, axis0) u = Range(by, count, by) "
    (found, given) = shapes(body + "y = Expand(one, n1)", "u", "y")
    assert found is not None
    assert found != given
