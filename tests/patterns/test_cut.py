"""What is stored of a region: the fewest bytes for a token; of equal cuts, the shortest model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_tricks.graph.shapes import annotate
from onnx_tricks.patterns.cut import Cut, find_cut
from onnx_tricks.patterns.region import Region
from onnx_tricks.patterns.region_search import find_regions
from tests import toys

D, V = toys.D, toys.V
# Stands for attention: it mixes tokens, so that nothing behind it is a function of an id.
MIX = "{0}_t = Transpose<perm=[0,2,1]>({0}) {0}_s = MatMul({0}, {0}_t) {0}_m = MatMul({0}_s, {0}) "


def cut_of(body: str, mixed: str) -> tuple[Region, Cut]:
    """The cut of a body that makes rows, of which some are mixed between tokens."""
    names = mixed.split()
    sums = " ".join(
        f"c_{one} = Cast<to=1>({one}_m) s_{one} = ReduceMean<keepdims=0>(c_{one})" for one in names
    )
    total = "y = Sum(" + ", ".join(f"s_{one}" for one in names) + ")"
    proto = toys.model(
        "x = Gather(table, ids) " + body + " " + "".join(map(MIX.format, names)) + sums + total,
        inputs="ids[b,s]",
        opset=18,
        extra={"narrow": np.ones((D, 3), np.float32), "wide": np.ones((3, 40), np.float32)},
    )
    model = ir.from_proto(proto)
    annotate(model)
    (region,) = find_regions(model)
    return region, find_cut(region)


@pytest.mark.parametrize(
    ("body", "mixed", "stored"),
    [
        ("q = MatMul(x, w_square)", "q", "q"),
        ("q = MatMul(x, w_square)", "x q", "x q"),
        ("q = MatMul(x, w) k = Relu(q)", "q k", "q"),
        ("q = MatMul(x, w_square) k = Concat<axis=-1>(q, q)", "k", "q"),
        ("q = MatMul(x, w_square) k, v = Split<axis=-1>(q, halves)", "k v", "q"),
        ("q = MatMul(x, w_square) k, v = Split<axis=-1>(q, halves)", "k", "k"),
        ("q = MatMul(x, w_square) k = Transpose<perm=[1,0,2]>(q)", "k", "q"),
        ("q = MatMul(x, w_square) k = Mul(q, half)", "k", "k"),
        ("q = MatMul(x, narrow) k = MatMul(q, wide)", "k", "k"),
        ("q = MatMul(x, w_square) k = Cast<to=11>(q)", "k", "q"),
    ],
)
def test_the_cheapest_cut_is_stored(body: str, mixed: str, stored: str) -> None:
    region, cut = cut_of(body, mixed)
    found = [region.members[key][0].name for key in cut.stored]
    assert found == stored.split()


def test_what_several_read_counts_once() -> None:
    # Two projections read x, so that storing it beside them would be one row more.
    region, cut = cut_of("q = MatMul(x, w_square) k = MatMul(x, w)", "q k")
    assert sum(region.row(key).width for key in cut.stored) == D + toys.F
    assert [one.node.op_type for one in cut.removed] == ["Gather", "MatMul", "MatMul"]
    assert cut.weights == 4 * (D * D + D * toys.F)
    assert cut.matrices


def test_equal_computations_are_stored_once() -> None:
    region, cut = cut_of("q = MatMul(x, w_square) k = MatMul(x, w_square)", "q k")
    (key,) = cut.stored
    assert [value.name for value in region.members[key]] == ["q", "k"]


def test_a_lookup_alone_is_not_worth_storing() -> None:
    _, cut = cut_of("q = Mul(x, half)", "q")
    assert not cut.matrices
