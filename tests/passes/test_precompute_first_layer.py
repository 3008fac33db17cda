"""precompute-first-layer on toy graphs: what is stored, what is refused, what the table holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import psutil
import pytest

from onnx_tricks import FoldNorm, PrecomputeFirstLayer, Skip
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.save import save_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.graph.sizes import measure
from onnx_tricks.passes.precompute_first_layer import FirstLayer
from onnx_tricks.rewrite import PassResult, run_passes
from onnx_tricks.runtime.tabulate import TabulatedTensor
from tests import toys

D, V = toys.D, toys.V

X = "x = Gather(table, ids) "
NORM = "n = LayerNormalization(x, g, beta) "
QKV = "q = MatMul(n, w_square) k = MatMul(n, w_key) v = MatMul(n, w_value) "
ATTENTION = (
    "kt = Transpose<perm=[0,2,1]>(k) s = MatMul(q, kt) p = Softmax<axis=-1>(s) a = MatMul(p, v) "
)
FFN = "u = MatMul(n, w_up) r = Relu(u) f = MatMul(r, w_down) "
HEAD = "y = MatMul(h, w)"
ADDED = "m = Add(f, a) h = Add(m, x) "
SERIAL = X + NORM + QKV + ATTENTION + "h = Add(x, a) " + HEAD
PARALLEL = X + NORM + QKV + ATTENTION + FFN + ADDED + HEAD


class Case(NamedTuple):
    """A change to a toy layer, and how many numbers are then stored for a token."""

    old: str = ""
    new: str = ""
    stored: tuple[int, ...] = (D, D, D, D)
    opset: int = 18

    def body(self, layer: str) -> str:
        assert self.old in layer
        return layer.replace(self.old, self.new) if self.old else layer


Q = "q = MatMul(n, w_square) "
SUM = "h = Add(x, a) "

# Of the serial layer. What is looked up is what was computed, in every bit.
SERIAL_CASES = {
    "as it is": Case(),
    "no norm": Case(NORM, "n = Relu(x) ", opset=11),
    "fused norm": Case(NORM, "n = RMSNormalization(x, g) ", opset=23),
    "embedding scale": Case(X, "e = Gather(table, ids) x = Mul(e, root_width) "),
    "embedding norm": Case(X, "e = Gather(table, ids) x = LayerNormalization(e, g, beta) "),
    "bias": Case(Q, "q0 = MatMul(n, w_square) q = Add(q0, b_row) "),
    "packed projection": Case(
        QKV, "z = MatMul(n, w_packed) q, k, v = Split<axis=-1>(z, thirds) ", (D, 3 * D)
    ),
    "sliced projection": Case(
        QKV,
        "z = MatMul(n, w_packed) q = Slice(z, at0, at1, axis2) k = Slice(z, at1, at2, axis2) "
        "v = Slice(z, at2, at3, axis2) ",
        (D, 3 * D),
    ),
    "weights of four bits": Case(
        Q, "q = com.microsoft.MatMulNBits<K=16, N=16, bits=4, block_size=16>(n, bits4, steps) "
    ),
    "norm of heads": Case(
        Q,
        "q0 = MatMul(n, w_square) q1 = Reshape(q0, heads) q2 = LayerNormalization(q1, g_head) "
        "q = Reshape(q2, joined) ",
    ),
    "norm of heads in front of tokens": Case(
        QKV + ATTENTION,
        "z = MatMul(n, w_square) z1 = Reshape(z, heads) t = Transpose<perm=[0,2,1,3]>(z1) "
        "q = LayerNormalization(t, g_head) k = Transpose<perm=[0,1,3,2]>(q) s = MatMul(q, k) "
        "p = Softmax<axis=-1>(s) o = MatMul(p, q) o1 = Transpose<perm=[0,2,1,3]>(o) "
        "a = Reshape(o1, joined) ",
        (D, D),
    ),
    "tokens flattened": Case(
        Q, "f = Reshape(n, flat) q0 = Gemm(f, w_square, b_row) sh = Shape(x) q = Reshape(q0, sh) "
    ),
    "shape of a row that goes": Case(
        SUM, "sh = Shape(n) c0 = ConstantOfShape(sh) h0 = Add(x, a) h = Add(h0, c0) "
    ),
    "shape of flattened rows that go": Case(
        SUM,
        "f = Reshape(n, flat) f1 = Shape(f) f2 = ConstantOfShape(f1) f3 = Size(f) "
        "f4 = Cast<to=TYPE>(f3) f5 = Shape<start=1>(f) f6 = Cast<to=TYPE>(f5) f7 = Mul(f4, f6) "
        "f8 = ReduceSum<keepdims=0>(f2) f9 = Add(f7, f8) h0 = Add(x, a) h = Mul(h0, f9) ",
    ),
    "rearranged ids": Case(
        X, "i = Unsqueeze(ids, axis0) j = Squeeze(i, axis0) x = Gather(table, j) "
    ),
    "table behind a Transpose": Case(
        X, "t = Transpose<perm=[1,0]>(table_turned) x = Gather(t, ids) "
    ),
    "table behind a Cast": Case(X, "t = Cast<to=TYPE>(table_half) x = Gather(t, ids) "),
    "table worked out": Case(X, "t = Mul(table, half) x = Gather(t, ids) "),
    "two tables": Case(X, "e = Gather(table, ids) e2 = Gather(table2, ids) x = Add(e, e2) "),
    "looked up twice": Case(SUM, "x2 = Gather(table, ids) h = Add(x2, a) "),
}

# Of the parallel layer: x + FFN is stored, and attention added to it.
PARALLEL_CASES = {
    "residual last": Case(),
    "residual first": Case(ADDED, "m = Add(x, a) h = Add(m, f) "),
    "summed beforehand": Case(ADDED, "m = Add(x, f) h = Add(m, a) "),
    "two others": Case(ADDED, "m = Add(f, a) b = Relu(a) m1 = Add(b, m) h = Add(m1, x) "),
    "in a norm that adds": Case(
        ADDED, "m = Add(f, a) h = com.microsoft.SkipSimplifiedLayerNormalization(x, m, g) "
    ),
    "experts": Case(
        FFN,
        "l = MatMul(n, w_router) top, best = TopK<axis=-1>(l, two_of) "
        "gate = Softmax<axis=-1>(top) nothing = Mul(l, zeros_row) "
        "spread = ScatterElements<axis=-1>(nothing, best, gate) n1 = Unsqueeze(n, axis2) "
        "n2 = Unsqueeze(n1, axis2) u = MatMul(n2, w_experts) r = Relu(u) o = MatMul(r, w_back) "
        "o1 = Squeeze(o, axis3) chosen = Unsqueeze(spread, last) o2 = Mul(o1, chosen) "
        "f = ReduceSum<keepdims=0>(o2, axis2) ",
    ),
}


def constants() -> dict[str, np.ndarray]:
    """Constants of the toy layer that `toys.weights` lacks, in float64."""
    normal = np.random.default_rng(7).standard_normal
    return {
        "w_key": normal((D, D)) / 4,
        "w_value": normal((D, D)) / 4,
        "w_up": normal((D, 40)) / 4,
        "w_down": normal((40, D)) / 6,
        "w_router": normal((D, 3)),
        "b_row": normal(D),
        "g_head": 1 + 0.3 * normal(D // 4),
        "table2": normal((V, D)),
        "table_turned": normal((D, V)),
        "places": normal((1, 5, D)),
        "position_table": normal((9, D)),
        "zeros_row": np.zeros(3),
        "steps": 0.1 * np.abs(normal(D)),
        "w_back": normal((3, toys.F, D)) / 4,
    }


# Branches of an If: each looks ids up on its own, or both read one lookup.
BRANCHES = """flagged = Cast<to=9>(flag)
y = If(flagged) <
then_branch = first () => (float[b, s, 12] y1) {{ {inside} y1 = MatMul(h, w) }},
else_branch = second () => (float[b, s, 12] y2) {{ {inside} h2 = Neg(h) y2 = MatMul(h2, w) }}>
"""

INTEGERS = {
    "thirds": np.array([D, D, D]),
    "joined": np.array([0, 0, -1]),
    "axis2": np.array([2]),
    "axis3": np.array([3]),
    "two_of": np.array([2]),
    **{f"at{i}": np.array([i * D]) for i in range(4)},
}


def toy(body: str, *, kind: str = "float", opset: int = 18, **options) -> onnx.ModelProto:
    extra: dict[str, np.ndarray] = {
        name: array.astype(toys.TYPES[kind]) for name, array in constants().items()
    }
    extra["bits4"] = np.random.default_rng(8).integers(0, 256, (D, 1, 8)).astype(np.uint8)
    extra["table_half"] = toys.weights()["table"].astype(np.float16)
    inputs = options.pop("inputs", "ids[b,s]")
    proto = toys.model(
        body, kind=kind, opset=opset, inputs=inputs, extra=extra | INTEGERS, **options
    )
    if "outputs" in options:
        for value in proto.graph.output:
            value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=[{}, {}, {}]))
    return proto


def store(
    proto: onnx.ModelProto, **options: object
) -> tuple[onnx.ModelProto, PassResult, tuple[int, ...]]:
    """Run the pass; also return how many numbers a token has in each part of the table."""
    model = ir.from_proto(proto)
    annotate(model)
    options.setdefault("max_growth", 1000.0)
    first = PrecomputeFirstLayer(**options)  # type: ignore[arg-type]
    site = next(iter(first.sites(model)), None)
    widths: tuple[int, ...] = ()
    if isinstance(site, FirstLayer):
        sums = {join.key: join.rows[0] for join in site.cut.joins}
        rows = [site.region.row(sums.get(key, key)) for key in site.cut.stored]
        widths = tuple(row.width for row in rows)
    (result,) = run_passes(model, [first])
    return ir.to_proto(model), result, widths


def refusal(proto: onnx.ModelProto, **options: object) -> str:
    after, result, _ = store(proto, **options)
    assert result.applied == []
    assert after == ir.to_proto(ir.from_proto(proto))
    (skip,) = result.skipped
    return skip.reason


def ids(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = toys.feeds(proto)
    for name, array in found.items():
        if array.dtype.kind == "i":
            array[0, 0] = -1  # counts from the end, as Gather does
            found[name] = array
    return found


@pytest.mark.parametrize("case", SERIAL_CASES.values(), ids=SERIAL_CASES)
def test_what_is_looked_up_is_what_was_computed_in_every_bit(case: Case) -> None:
    proto = toy(case.body(SERIAL), opset=case.opset)
    after, result, widths = store(proto)
    assert (len(result.applied), widths) == (1, case.stored)
    onnx.checker.check_model(after)
    feeds = ids(proto)
    np.testing.assert_array_equal(toys.run(after, feeds)[0], toys.run(proto, feeds)[0])


@pytest.mark.parametrize("case", PARALLEL_CASES.values(), ids=PARALLEL_CASES)
def test_sums_of_a_parallel_block_change_their_order_and_nothing_else(case: Case) -> None:
    # The operator that adds and normalises has no kernel for float64.
    fused = "h = com.microsoft.SkipSimplifiedLayerNormalization(x, m, g)"
    apart = "h0 = Add(x, m) h = SimplifiedLayerNormalization(h0, g)"
    body = case.body(PARALLEL)
    exact, proto = toy(body.replace(fused, apart), kind="double"), toy(body)
    after, result, widths = store(proto)
    assert (len(result.applied), widths) == (1, case.stored)
    onnx.checker.check_model(after)
    feeds = ids(proto)
    reference = toys.run_exactly(exact, feeds)[0]
    before, now = (toys.error(toys.run(one, feeds)[0], reference) for one in (proto, after))
    assert now <= 2 * before
    assert not {"w_up", "w_experts"} & {one.name for one in after.graph.initializer}


@pytest.mark.parametrize("kind", ["float", "float16", "double", "bfloat16"])
def test_the_table_has_the_type_of_the_model(kind: str) -> None:
    proto = toy(SERIAL, kind=kind)
    after, _, _ = store(proto)
    table = next(one for one in after.graph.initializer if one.name == "table.first_layer")
    assert (table.data_type, list(table.dims)) == (toys.ONNX_TYPES[kind], [V, 4 * D])
    array = ir.from_proto(table).numpy()
    exact, feeds = toy(SERIAL, kind="double"), {"ids": np.arange(V)[None]}
    columns = dict(zip("xqkv", np.split(array.astype(np.float64), 4, axis=1), strict=True))
    for name, found in columns.items():
        exact.graph.output[0].name = name
        expected = toys.run_exactly(exact, feeds)[0][0]
        eps = float(
            np.finfo(np.float16).eps if kind == "bfloat16" else np.finfo(toys.TYPES[kind]).eps
        )
        # Weights are rounded to the type as well, so that some roundings add up.
        assert toys.error(found, expected) < (8 * 2 if kind == "bfloat16" else 4) * eps, name


def test_a_table_is_written_in_blocks_the_last_of_which_is_shorter(tmp_path) -> None:
    rows = np.random.default_rng(0).standard_normal((2500, D)).astype(np.float32)
    proto = toy(SERIAL)
    next(one for one in proto.graph.initializer if one.name == "table").CopyFrom(
        onnx.numpy_helper.from_array(rows, "table")
    )
    seen: list[int] = []

    @contextlib.contextmanager
    def bar(total: int) -> Iterator[object]:
        seen.append(total)
        yield lambda new: seen.append(new)

    model = ir.from_proto(proto)
    run_passes(model, [PrecomputeFirstLayer(max_growth=1e6, bar=bar)])
    table = model.graph.initializers["table.first_layer"].const_value
    assert isinstance(table, TabulatedTensor)
    assert seen == []  # nothing is computed before it is written
    with (tmp_path / "table").open("wb") as file:
        table.tofile(file)
    assert seen == [2500, 1024, 1024, 2500 - 2048]
    written = np.fromfile(tmp_path / "table", np.float32).reshape(2500, -1)
    np.testing.assert_array_equal(written, table.numpy())
    np.testing.assert_array_equal(written[:, :D], rows)


def test_building_a_table_takes_memory_for_a_block_of_it(tmp_path: Path) -> None:
    rows, width = 60_000, 256
    random = np.random.default_rng(0)
    proto = toy(X + "n = Relu(x) " + QKV + ATTENTION + SUM + "y = Relu(h)")
    for weight in proto.graph.initializer:
        shape = (rows if weight.name == "table" else width, width)
        array = random.standard_normal(shape, np.float32)
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True)
    del proto, array, weight
    process, most = psutil.Process(), 0

    @contextlib.contextmanager
    def bar(total: int) -> Iterator[object]:
        def look(_: int) -> None:
            nonlocal most
            most = max(most, process.memory_info().rss)

        yield look

    model = load_model(tmp_path / "model.onnx").model
    run_passes(model, [PrecomputeFirstLayer(max_growth=1e6, bar=bar)])
    before = process.memory_info().rss
    save_model(model, tmp_path / "out.onnx", DataLayout(("out.onnx.data",)))
    table = rows * 4 * width * 4
    assert (tmp_path / "out.onnx.data").stat().st_size == table
    assert 0 < most < before + table / 2  # what was held before may have been given back


@pytest.mark.parametrize("where", ["in each branch", "before the branches"])
def test_branches_of_an_if_share_one_table(where: str) -> None:
    layer = SERIAL.removesuffix(HEAD)
    if where == "in each branch":
        body = BRANCHES.format(inside=layer)
    else:
        body = X + BRANCHES.format(inside=layer.removeprefix(X))
    proto = toy(body, inputs="ids[b,s] flag[1]")
    after, result, widths = store(proto)
    assert (len(result.applied), widths) == (1, (D,) * 4)
    assert [one.name for one in after.graph.initializer if "first_layer" in one.name] == [
        "table.first_layer",
        "table.first_layer.widths",
    ]
    onnx.checker.check_model(after)
    for flag in (0, 1):
        feeds = ids(proto) | {"flag": np.full(1, flag, np.float32)}
        np.testing.assert_array_equal(toys.run(after, feeds)[0], toys.run(proto, feeds)[0])


def test_rows_that_the_model_returns_keep_their_names() -> None:
    proto = toy(SERIAL, outputs="x, y, n, q")
    after, _, widths = store(proto)
    assert widths == (D,) * 5
    assert [one.name for one in after.graph.output] == ["x", "y", "n", "q"]
    for found, expected in zip(
        toys.run(after, ids(proto)), toys.run(proto, ids(proto)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_one_row_returned_under_two_names_is_stored_once() -> None:
    proto = toy(SERIAL + " q2 = MatMul(n, w_square)", outputs="y, q, q2")
    after, _, widths = store(proto)
    assert widths == (D,) * 4
    for found, expected in zip(
        toys.run(after, ids(proto)), toys.run(proto, ids(proto)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", ["s", "1,s", "b,7", "b,c,s"])
def test_ids_of_any_shape_are_looked_up(shape: str) -> None:
    body = (
        X + "n = LayerNormalization(x, g, beta) q = MatMul(n, w_square) "
        "m = ReduceMean<keepdims=1>(q, axis0) h = Add(x, m) y = MatMul(h, w)"
    )
    proto = toy(body, inputs=f"ids[{shape}]")
    after, result, widths = store(proto)
    assert (len(result.applied), widths) == (1, (D, D))
    rng, dims = (
        np.random.default_rng(3),
        [int(one) if one.isdigit() else 3 for one in shape.split(",")],
    )
    feeds = {"ids": rng.integers(-V, V, dims)}
    np.testing.assert_array_equal(toys.run(after, feeds)[0], toys.run(proto, feeds)[0])


def test_ids_of_32_bits_are_looked_up() -> None:
    proto = toy(SERIAL)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    after, result, _ = store(proto)
    assert len(result.applied) == 1
    feeds = {"ids": ids(proto)["ids"].astype(np.int32)}
    np.testing.assert_array_equal(toys.run(after, feeds)[0], toys.run(proto, feeds)[0])


def test_ids_of_one_token_are_looked_up_behind_a_reshape_to_their_own_shape() -> None:
    shape = "si = Shape(ids) t = Gather(si, axis1) to = Concat<axis=0>(last, t) "
    body = shape + "f = Reshape(ids, to) " + SERIAL.replace("(table, ids)", "(table, f)")
    proto = toy(body, inputs="ids[b,1]")
    after, result, _ = store(proto)
    assert len(result.applied) == 1
    np.testing.assert_array_equal(toys.run(after, ids(proto))[0], toys.run(proto, ids(proto))[0])


def test_a_table_is_computed_for_a_model_of_a_newer_format_than_the_runtime_reads() -> None:
    proto = toy(SERIAL)
    proto.ir_version = 99
    after, result, _ = store(proto)
    assert (len(result.applied), after.ir_version) == (1, 99)
    after.ir_version = proto.ir_version = 10
    np.testing.assert_array_equal(toys.run(after, ids(proto))[0], toys.run(proto, ids(proto))[0])


def test_positions_inside_attention_are_no_reason_once_the_layer_is_stored() -> None:
    turn = "pos = Gather(position_table, places_of) k2 = Mul(k, pos) "
    turned = turn + ATTENTION.replace("(k)", "(k2)")
    proto = toy(SERIAL.replace(ATTENTION, turned), inputs="ids[b,s] places_of[s]")
    indices = [value for value in proto.graph.input if value.name == "places_of"]
    indices[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    model = ir.from_proto(proto)
    (result,) = run_passes(model, [PrecomputeFirstLayer(max_growth=1e3)])
    assert (result.count, result.skipped) == (1, [])


def test_a_second_run_finds_nothing() -> None:
    after, _, _ = store(toy(PARALLEL))
    again, result, _ = store(after)
    assert (result.applied, result.skipped) == ([], [])
    assert again == after


def test_the_first_layer_and_its_table_go() -> None:
    proto = toy(SERIAL)
    model = ir.from_proto(proto)
    (site,) = PrecomputeFirstLayer(max_growth=1e3).sites(model)
    before = measure(ir.from_proto(proto))
    after = measure(ir.from_proto(store(proto)[0]))
    # Besides the table there are the widths of its parts.
    assert after.bytes - 4 * 8 == site.growth.after
    assert after.parameters - before.parameters == site.growth.parameters
    assert site.growth.removed == 4 * (3 * D * D + 2 * D + V * D)
    assert site.growth.reads_before == 4 * (3 * D * D + 2 * D + D)
    assert site.growth.reads_after == 4 * 4 * D


def test_a_tied_table_stays_and_counts() -> None:
    proto = toy(SERIAL.replace(HEAD, "t = Transpose<perm=[1,0]>(table) y = MatMul(h, t)"))
    (site,) = PrecomputeFirstLayer(max_growth=1e3).sites(ir.from_proto(proto))
    after, _, _ = store(proto)
    assert site.growth.removed == 4 * (3 * D * D + 2 * D)
    assert "table" in {one.name for one in after.graph.initializer}
    assert measure(ir.from_proto(after)).bytes - 4 * 8 == site.growth.after
    np.testing.assert_array_equal(toys.run(after, ids(proto))[0], toys.run(proto, ids(proto))[0])


def test_a_table_that_grows_too_much_is_refused_with_what_it_would_have_been() -> None:
    proto = toy(SERIAL)
    reason = refusal(proto, max_growth=12.0)
    before, table = measure(ir.from_proto(proto)).bytes, V * 4 * D * 4
    removed = 4 * (3 * D * D + 2 * D + V * D)
    percent = 100 * (table - removed) / before
    assert f"{table:,} bytes" in reason
    assert f"{removed:,} bytes would go" in reason
    assert f"by {percent:.1f} %, from {before:,} to {before + table - removed:,} bytes" in reason
    assert "--max-growth 12" in reason
    assert len(store(proto, max_growth=percent + 0.1)[1].applied) == 1


REFUSED = {
    "learned positions": (
        "r = Shape<start=1>(ids) e = Gather(table, ids) pos = Gather(position_table, places_of) "
        "x = Add(e, pos) " + SERIAL.removeprefix(X),
        "ids[b,s] places_of[s]",
        "rows of 'position_table'",
    ),
    "constant positions": (
        "e = Gather(table, ids) x = Add(e, places) " + SERIAL.removeprefix(X),
        "ids[b,5]",
        "adds rows of 'places' that do not come from the token ids",
    ),
    "positions by index": (
        "at = Unsqueeze(places_of, last) pos = GatherND(position_table, at) "
        "e = Gather(table, ids) x = Add(e, pos) " + SERIAL.removeprefix(X),
        "ids[b,s] places_of[s]",
        "adds rows of 'position_table' that do not come from the token ids",
    ),
    "computed positions": (
        "at = Unsqueeze(places_of, last) angle = Cast<to=TYPE>(at) all = Mul(angle, g) "
        "pos = Sin(all) e = Gather(table, ids) x = Add(e, pos) " + SERIAL.removeprefix(X),
        "ids[b,s] places_of[s]",
        "adds rows of 'pos' that do not come from the token ids",
    ),
    "embeddings as input": (SERIAL.removeprefix(X), "x[b,s,D]", "no Gather looks up token ids"),
    "quantised on the way": (
        X
        + "z, zs, zp = DynamicQuantizeLinear(x) n = DequantizeLinear(z, zs, zp) "
        + QKV
        + ATTENTION
        + "h = Add(x, a) "
        + HEAD,
        "ids[b,s]",
        "no linear layer with constant weights lies between",
    ),
    "weights that are inputs": (
        SERIAL.replace("w_square", "wq").replace("w_key", "wq").replace("w_value", "wq"),
        "ids[b,s] wq[D,D]",
        "no linear layer with constant weights lies between",
    ),
}


@pytest.mark.parametrize(("body", "inputs", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_function_of_the_id_alone_is_refused_with_a_reason(
    body: str, inputs: str, reason: str
) -> None:
    proto = toy(body, inputs=inputs)
    for value in proto.graph.input:
        if value.name == "places_of":
            value.type.tensor_type.elem_type = onnx.TensorProto.INT64
    assert reason in refusal(proto)


@pytest.mark.parametrize("fold_first", [True, False])
def test_it_stacks_with_fold_norm_in_either_order(fold_first: bool) -> None:
    second = "n2 = LayerNormalization(h, g, beta) y = MatMul(n2, w)"
    body = SERIAL.replace(HEAD, second)
    exact, proto = toy(body, kind="double"), toy(body)
    passes = [FoldNorm(), PrecomputeFirstLayer(max_growth=1e3)]
    model = ir.from_proto(proto)
    results = run_passes(model, passes if fold_first else passes[::-1])
    applied = {result.name: result.count for result in results}
    assert applied == {"precompute-first-layer": 1, "fold-norm": 2 if fold_first else 1}
    feeds = ids(proto)
    reference = toys.run_exactly(exact, feeds)[0]
    before, now = (
        toys.error(toys.run(one, feeds)[0], reference) for one in (proto, ir.to_proto(model))
    )
    assert now <= 2 * before


def test_a_folded_tied_table_is_read_as_it_is_after_the_fold() -> None:
    tied = "n2 = LayerNormalization(h, g) t = Transpose<perm=[1,0]>(table) y = MatMul(n2, t)"
    proto = toy(SERIAL.replace(HEAD, tied))
    exact = toy(SERIAL.replace(HEAD, tied), kind="double")
    model = ir.from_proto(proto)
    results = run_passes(model, [FoldNorm(), PrecomputeFirstLayer(max_growth=1e3)])
    assert [result.count for result in results] == [2, 1]
    feeds = ids(proto)
    reference = toys.run_exactly(exact, feeds)[0]
    before, now = (
        toys.error(toys.run(one, feeds)[0], reference) for one in (proto, ir.to_proto(model))
    )
    assert now <= 2 * before


def test_sites_say_what_bounds_them() -> None:
    (site,) = PrecomputeFirstLayer(max_growth=1e3).sites(ir.from_proto(toy(SERIAL)))
    assert (site.inputs, site.outputs) == (("ids",), ("x", "q", "k", "v"))
    parallel = toy(PARALLEL)
    (site,) = PrecomputeFirstLayer(max_growth=1e3).sites(ir.from_proto(parallel))
    assert (site.inputs, site.outputs) == (("ids", "a"), ("q", "k", "v", "h"))


def test_a_skip_names_the_lookup() -> None:
    proto = toy("[embed] x = Gather(table, ids) " + SERIAL.removeprefix(X))
    (skip,) = PrecomputeFirstLayer(max_growth=-50).sites(ir.from_proto(proto))
    assert isinstance(skip, Skip)
    assert skip.node == "embed"
