"""Damaged and hostile models: each is read or refused in words, and refused ones write nothing."""

from __future__ import annotations

import random
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

import onnx_tricks

_CASES = 500
_SECONDS = 10
"""For one case; each takes milliseconds unless something hangs."""

_NUMBERS = [-1, 0, 1, 2, 15, 2**31 - 1, 2**31, 2**40, 2**60, 2**63 - 1, -(2**63)]
_LOCATIONS = ["", ".", "/etc/passwd", "../m.data", "m.data", "m.onnx", "nowhere", "\0", "/dev/zero"]
_OFFSETS = ["-1", "1", "99999999999999999999", "x", "", "0x0", "1e3", "²", "4096", "9" * 6000]


def _subject(path: Path, output: Path) -> None:
    """What is tried on every case."""
    onnx_tricks.optimize(path, output, verify=False)


def _norm(x: str, gain: str, y: str) -> list[onnx.NodeProto]:
    """A decomposed RMSNorm, so that passes have something to find."""
    steps = [
        ("Pow", [x, "two"], f"{y}.square"),
        ("ReduceMean", [f"{y}.square", "axes"], f"{y}.mean"),
        ("Add", [f"{y}.mean", "epsilon"], f"{y}.shifted"),
        ("Sqrt", [f"{y}.shifted"], f"{y}.root"),
        ("Div", [x, f"{y}.root"], f"{y}.normed"),
        ("Mul", [gain, f"{y}.normed"], y),
    ]
    return [helper.make_node(op, ins, [out], name=f"/{out}/{op}") for op, ins, out in steps]


def _model() -> onnx.ModelProto:
    """Norms in several spellings and linear layers, also in both branches of an If."""
    rng = np.random.default_rng(0)
    width = 24
    arrays = {
        "two": np.array(2, np.float32),
        "axes": np.array([-1]),
        "epsilon": np.array(1e-6, np.float32),
        "gain": rng.standard_normal(width, dtype=np.float32),
        "w": rng.standard_normal((width, width), dtype=np.float32),
        "w16": rng.standard_normal((width, width)).astype(np.float16),
    }
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    weights.append(helper.make_tensor("typed", TensorProto.INT32, [3], [1, 2, 3]))

    def branch(name: str) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.ones((width, 4), np.float32), f"{name}.w")
        nodes = [
            *_norm("h", "gain", f"{name}.n"),
            helper.make_node("MatMul", [f"{name}.n", f"{name}.w"], [f"{name}.y"]),
        ]
        output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["n", 4])
        return helper.make_graph(nodes, name, [], [output], [weight])

    big = numpy_helper.from_array(np.ones((width, width), np.float32))
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "gain"], ["n0"], name="ln", axis=-1),
        helper.make_node("MatMul", ["n0", "w"], ["h0"], name="first"),
        *_norm("h0", "gain", "n1"),
        helper.make_node(
            "SkipSimplifiedLayerNormalization",
            ["h0", "n1", "gain"],
            ["n2", "", "", "sum"],
            name="skip",
            domain="com.microsoft",
            epsilon=1e-6,
        ),
        helper.make_node("SimplifiedLayerNormalization", ["sum", "gain"], ["n3"], name="simple"),
        helper.make_node("MatMul", ["n2", "w"], ["h2"], name="after skip"),
        helper.make_node("Gemm", ["n3", "w", "gain"], ["h3"], name="gemm", transB=1),
        helper.make_node("Sum", ["n1", "h2", "h3"], ["n4"], name="sum"),
        helper.make_node("Constant", [], ["c"], name="c", value=big),
        helper.make_node("MatMul", ["n4", "c"], ["h"], name="second"),
        helper.make_node(
            "If", ["flag"], ["y"], name="if", then_branch=branch("t"), else_branch=branch("e")
        ),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", width]))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


_WHOLE = _model()
_BYTES = _WHOLE.SerializeToString(deterministic=True)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    found = []
    for graph in _graphs(model.graph):
        found += [*graph.initializer]
        found += [a.t for node in graph.node for a in node.attribute if a.name == "value"]
    return found


def _copy() -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(_WHOLE)
    return model


def _truncated(rng: random.Random, folder: Path) -> bytes:
    return _BYTES[: rng.randrange(len(_BYTES))]


def _flipped(rng: random.Random, folder: Path) -> bytes:
    content = bytearray(_BYTES)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _flipped_between_the_weights(rng: random.Random, folder: Path) -> bytes:
    """Weights are most of a model and any bytes will do for them: damage what is left."""
    model = _copy()
    for tensor in _tensors(model):
        tensor.raw_data = tensor.raw_data[:16]
        shorter = (
            len(tensor.raw_data)
            // np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        )
        tensor.dims[:] = [shorter] if tensor.dims else []
    content = bytearray(model.SerializeToString())
    for _ in range(rng.choice([1, 2, 4])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def _spliced(rng: random.Random, folder: Path) -> bytes:
    start, end = sorted(rng.randrange(len(_BYTES)) for _ in range(2))
    if rng.random() < 0.5:
        return _BYTES[:start] + _BYTES[end:]
    return _BYTES[:end] + _BYTES[start:]


def _hostile_external(rng: random.Random, folder: Path) -> bytes:
    model = _copy()
    (folder / "m.data").write_bytes(bytes(rng.choice([0, 100, 3000, 5000])))
    for tensor in rng.sample(_tensors(model), 2):
        if rng.random() < 0.8:
            tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        values = [("location", rng.choice(_LOCATIONS)), ("offset", rng.choice(["0", *_OFFSETS]))]
        values.append(("length", rng.choice(["576", "2304", *_OFFSETS])))
        values.append(("key", "value"))
        for key, value in rng.sample(values, rng.randrange(1, 5)):
            tensor.external_data.add(key=key, value=value)
    return model.SerializeToString()


def _hostile_tensor(rng: random.Random, folder: Path) -> bytes:
    model = _copy()
    for tensor in rng.sample(_tensors(model), 2):
        kind = rng.randrange(7)
        if kind == 0:
            tensor.dims[:] = [rng.choice(_NUMBERS) for _ in range(rng.choice([0, 1, 2, 3, 70]))]
        elif kind == 5:  # other shapes of as many elements
            size = int(np.prod(tensor.dims))
            tensor.dims[:] = rng.choice(
                [[size], [1, size], [size, 1], [size // 2, 2], [1] * 9 + [size]]
            )
        elif kind == 6:  # other dtypes of as many bytes
            same = {1: [6, 12], 7: [11, 13, 14], 10: [4, 5, 16]}
            tensor.data_type = rng.choice(same.get(tensor.data_type, [1]))
        elif kind == 1:
            tensor.data_type = rng.choice([*range(30), -1, 2**31 - 1])
        elif kind == 2:
            tensor.raw_data = bytes(rng.choice([0, 1, 3, 2305]))
        elif kind == 3:
            tensor.int32_data.extend([rng.randrange(100)] * rng.randrange(4))
        else:
            tensor.name = rng.choice(["", "w", "x", "y", "h", "n1"])
    return model.SerializeToString()


def _hostile_graph(rng: random.Random, folder: Path) -> bytes:
    """Cycles, undefined and repeated names, swapped operators, operands left out, lost nodes."""
    model = _copy()
    graph = rng.choice(list(_graphs(model.graph)))
    names = ["", "nowhere", *(name for node in graph.node for name in (*node.input, *node.output))]
    for _ in range(rng.choice([1, 1, 2, 4])):
        node = rng.choice(graph.node)
        kind = rng.randrange(7)
        if kind == 0 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        elif kind == 1:
            node.output[0] = rng.choice(names)
        elif kind == 2:
            node.op_type = rng.choice(["", "MatMul", "Mul", "Gemm", "If", "Constant", "Split"])
        elif kind == 3 and node.input:
            del node.input[rng.randrange(len(node.input))]
        elif kind == 4:
            node.input.append(rng.choice(names))
        elif kind == 5 and len(graph.node) > 1:
            graph.node.remove(node)
        else:
            order = rng.sample([*graph.node], len(graph.node))
            copies = [onnx.NodeProto.FromString(each.SerializeToString()) for each in order]
            del graph.node[:]
            graph.node.extend(copies)
    return model.SerializeToString()


def _hostile_attribute(rng: random.Random, folder: Path) -> bytes:
    model = _copy()
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    for _ in range(rng.choice([1, 2])):
        node = rng.choice(nodes)
        if node.attribute and rng.random() < 0.5:
            attribute = rng.choice(node.attribute)
        else:
            attribute = node.attribute.add(name=rng.choice(["axis", "perm", "epsilon", "to", ""]))
        attribute.type = rng.choice(AttributeProto.AttributeType.values())
        if rng.random() < 0.5:
            attribute.ints.extend(rng.choice(_NUMBERS) for _ in range(rng.randrange(4)))
        else:
            attribute.i = rng.choice(_NUMBERS)
    return model.SerializeToString()


def _hostile_shape(rng: random.Random, folder: Path) -> bytes:
    model = _copy()
    graph = model.graph
    for _ in range(rng.choice([1, 2])):
        info = rng.choice([*graph.input, *graph.output, *graph.value_info])
        if rng.random() < 0.3:
            info.name = rng.choice(["", "w", "x", "h", "gain"])
        kind = info.type.tensor_type
        kind.elem_type = rng.choice([kind.elem_type, 0, 1, 8, 10, 16, 99, -5])
        for dim in kind.shape.dim:
            dim.dim_value = rng.choice(_NUMBERS)
    if rng.random() < 0.3:
        graph.value_info.append(rng.choice(graph.input))
    if rng.random() < 0.2:
        model.opset_import[0].version = rng.choice(_NUMBERS)
    if rng.random() < 0.2:
        model.ir_version = rng.choice(_NUMBERS)
    return model.SerializeToString()


def _noise(rng: random.Random, folder: Path) -> bytes:
    """Keys and lengths of protobuf, at random."""
    return b"".join(
        bytes([rng.choice([0x08, 0x0A, 0x2A, 0x3A, 0x42, 0x4A, rng.randrange(256)])])
        + rng.choice(
            [b"", b"\x05", b"\xff\xff\xff\xff\x0f", struct.pack("<q", rng.choice(_NUMBERS))]
        )
        for _ in range(rng.randrange(1, 60))
    )


_Mutation = Callable[[random.Random, Path], bytes]
_MUTATIONS: list[_Mutation] = [
    _truncated,
    _flipped,
    _flipped_between_the_weights,
    _spliced,
    _hostile_external,
    _hostile_tensor,
    _hostile_graph,
    _hostile_attribute,
    _hostile_shape,
    _noise,
]


def _overdue(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"a case takes more than {_SECONDS} s")


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("mutation", _MUTATIONS, ids=lambda mutation: mutation.__name__[1:])
def test_a_damaged_model_is_read_or_refused_in_words(tmp_path: Path, mutation: _Mutation) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    path, target = source / "m.onnx", output / "m.onnx"
    refused = 0
    old_handler = signal.signal(signal.SIGALRM, _overdue)
    try:
        for case in range(_CASES):
            rng = random.Random(f"{mutation.__name__} {case}")
            path.write_bytes(mutation(rng, source))
            before = {each.name: each.stat().st_mtime_ns for each in source.iterdir()}
            message = None
            signal.alarm(_SECONDS)
            try:
                _subject(path, target)
            except (onnx_tricks.ModelError, onnx_tricks.UsageError) as error:
                message = str(error)
            except Exception as error:
                raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            if message is not None:
                refused += 1
                assert "m.onnx" in message, case
                assert not list(output.iterdir()), f"case {case} was refused and wrote a file"
            assert {each.name: each.stat().st_mtime_ns for each in source.iterdir()} == before
            for each in output.iterdir():
                each.unlink()
    finally:
        signal.signal(signal.SIGALRM, old_handler)
    assert refused > _CASES // 50


def test_the_undamaged_model_is_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(_BYTES)
    _subject(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").graph.node
