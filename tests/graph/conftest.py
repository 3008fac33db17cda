"""Small models that hold one of everything that reading and writing must keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

_SEED = 7


def _weights() -> list[onnx.TensorProto]:
    rng = np.random.default_rng(_SEED)
    arrays = {
        "w.float": rng.standard_normal((48, 32), dtype=np.float32),
        "w.half": rng.standard_normal((40, 32)).astype(np.float16),
        "w.bfloat16": rng.standard_normal((40, 32)).astype(ml_dtypes.bfloat16),
        "w.double": rng.standard_normal((16, 16)),
        "w.int4": rng.integers(-8, 8, (65, 47)).astype(ml_dtypes.int4),
        "w.bool": rng.integers(0, 2, (64, 64)).astype(np.bool_),
        "w.default": rng.standard_normal((16, 32), dtype=np.float32),
        "small": rng.standard_normal(4, dtype=np.float32),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 5), dtype=np.float32),
    }
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    tensors.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"\xc3\xa9"]))
    typed = rng.standard_normal(300).astype(np.float32)
    tensors.append(helper.make_tensor("w.typed", TensorProto.FLOAT, [300], typed.tolist()))
    tensors[0].doc_string = "what the weight is"
    tensors[0].metadata_props.add(key="origin", value="here")
    return tensors


def _branch(name: str, weight: float) -> onnx.GraphProto:
    tensor = numpy_helper.from_array(np.full(512, weight, np.float32), f"{name}.w")
    nodes = [
        helper.make_node("ReduceSum", [f"{name}.w"], [f"{name}.sum"], name=f"{name}.ReduceSum"),
        helper.make_node("Mul", ["joined", f"{name}.sum"], [f"{name}.out"], name=f"{name}.Mul"),
    ]
    output = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [output], [tensor])


@pytest.fixture
def rich_model() -> onnx.ModelProto:
    """A model that `onnx.checker` accepts, with weights of many dtypes at every depth."""
    big = numpy_helper.from_array(np.arange(32, dtype=np.float32).repeat(16).reshape(16, 32), "c")
    nodes = [
        helper.make_node("MatMul", ["x", "w.float"], ["h"], name="mm", doc_string="the layer"),
        helper.make_node("Constant", [], ["c"], name="const", value=big),
        helper.make_node("MatMul", ["h", "transposed"], ["h2"], name="mm2"),
        helper.make_node("Transpose", ["c"], ["transposed"], name="tr", perm=[1, 0]),
        helper.make_node("Affine", ["h2"], ["affine"], name="f", domain="local", alpha=0.5),
        helper.make_node("MatMul", ["affine", "w.default"], ["joined"], name="mm3"),
        helper.make_node(
            "If",
            ["flag"],
            ["y"],
            name="if",
            then_branch=_branch("then", 1.0),
            else_branch=_branch("else", 2.0),
        ),
        helper.make_node("Split", ["y"], ["y1", ""], name="split", num_outputs=2, axis=0),
        helper.make_node("SequenceConstruct", ["y1"], ["sequence"], name="seq"),
    ]
    nodes[2], nodes[3] = nodes[3], nodes[2]
    nodes[0].metadata_props.add(key="scope", value="model.layers.0")
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, 48]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        helper.make_tensor_value_info("w.default", TensorProto.FLOAT, [16, 32]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 32]),
        helper.make_tensor_sequence_value_info("sequence", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "main", inputs, outputs, _weights(), doc_string="a graph")
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 7, 32]))
    annotation = graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="small")
    graph.metadata_props.add(key="graph key", value="graph value")
    body = [
        helper.make_node("Constant", [], ["one"], name="one", value_float=1.0),
        helper.make_node("LeakyRelu", ["a"], ["l"], name="leaky"),
        helper.make_node("Add", ["l", "one"], ["b"], name="add"),
    ]
    alpha = body[1].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT)
    alpha.ref_attr_name = "alpha"
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Affine", ["a"], ["b"], body, opsets[:1], ["alpha"])
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        functions=[function],
        ir_version=10,
        producer_name="tests",
        producer_version="1.2",
        domain="org.example",
        model_version=3,
        doc_string="a model",
    )
    helper.set_model_props(model, {"license": "MIT", "author": "nobody"})
    onnx.checker.check_model(model)
    return model


SaveExternal = Callable[..., Path]


@pytest.fixture
def save_external(rich_model: onnx.ModelProto) -> SaveExternal:
    """Write the rich model with external data."""

    def save(path: Path, location: str | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = onnx.ModelProto()
        model.CopyFrom(rich_model)  # onnx.save empties the model it is given
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location=location or f"{path.name}_data",
            size_threshold=1024,
        )
        return path

    return save


def _canonical(path: Path) -> tuple[onnx.ModelProto, dict[tuple[str, ...], object]]:
    """A model without its weights, in one spelling; and its weights as bytes, at every depth."""
    model = onnx.load(path)
    weights: dict[tuple[str, ...], object] = {}

    def visit(graph: onnx.GraphProto, where: tuple[str, ...]) -> None:
        names = {tensor.name for tensor in graph.initializer}
        for tensor in graph.initializer:
            array = numpy_helper.to_array(tensor)
            texts = (tensor.doc_string, [(e.key, e.value) for e in tensor.metadata_props])
            content = array.tolist() if array.dtype == object else array.tobytes()
            weights[(*where, tensor.name)] = (array.dtype, array.shape, content, texts)
        infos = sorted(
            (info for info in graph.value_info if info.name not in names), key=lambda i: i.name
        )
        del graph.initializer[:], graph.value_info[:]
        graph.value_info.extend(infos)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g, (*where, node.name, attribute.name))

    visit(model.graph, ())
    for entries in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in entries:
            entry.domain = str(entry.domain)  # an absent domain is the empty one
    for node in model.graph.node:
        while node.output and not node.output[-1]:
            del node.output[-1]
    properties = sorted(model.metadata_props, key=lambda entry: entry.key)
    del model.metadata_props[:]
    model.metadata_props.extend(properties)
    return model, weights


@pytest.fixture
def assert_same_model() -> Callable[[Path, Path], None]:
    """Compare two model files: everything but the order of entries and where weights lie."""

    def compare(first: Path, second: Path) -> None:
        (model, weights), (other, others) = _canonical(first), _canonical(second)
        assert weights == others
        assert str(model) == str(other)

    return compare
