"""The demo model in other types, and models with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_tricks.models import demo_path

Edit = Callable[[onnx.ModelProto], None]

_TYPES = {
    "fp16": (np.float16, onnx.TensorProto.FLOAT16),
    "bf16": (ml_dtypes.bfloat16, onnx.TensorProto.BFLOAT16),
}


def tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """All initializers and constants."""
    found = list(model.graph.initializer)
    for node in model.graph.node:
        found += [attr.t for attr in node.attribute if attr.type == onnx.AttributeProto.TENSOR]
    return found


def change(tensor: onnx.TensorProto, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the numbers of a tensor, in its own type."""
    array = numpy_helper.to_array(tensor)
    result = edit(array.astype(np.float32)).astype(array.dtype)
    tensor.CopyFrom(numpy_helper.from_array(result, tensor.name))


def parse(graph: str) -> onnx.ModelProto:
    """Parse a graph in ONNX text; weights that it declares without values get seeded ones."""
    header = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(header + graph)
    random = np.random.default_rng(5)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
    del model.graph.value_info[:]
    return model


def rescaled(body: str, folder: Path) -> tuple[Path, Path, Path]:
    """A model, the same with its weights rescaled, and one that is wrong by a millionth.

    Args:
        body: A graph with the constants w, [16, 1], and c, [16], by which rows are multiplied.
        folder: Where they are saved.
    """
    random = np.random.default_rng(6)
    w, c = random.standard_normal((16, 1)), random.uniform(0.5, 2, 16)
    w, c = w.astype(np.float32), c.astype(np.float32)

    def write(name: str, w: np.ndarray, c: np.ndarray) -> Path:
        model = parse(body)
        for tensor, array in zip(tensors(model), (w, c), strict=True):
            change(tensor, lambda _, array=array: array)
        onnx.save(model, folder / name)
        return folder / name

    return (
        write("original.onnx", w, np.ones(16)),
        write("rescaled.onnx", w / c[:, None], c),
        write("wrong.onnx", w / c[:, None] * np.float32(1 + 1e-6), c),
    )


def _narrow(model: onnx.ModelProto, kind: str) -> None:
    """Make every floating value of a model a narrower one."""
    dtype, number = _TYPES[kind]
    for tensor in tensors(model):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            limit = float(ml_dtypes.finfo(dtype).max)
            narrow = np.clip(array, -limit, limit).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    for node in model.graph.node:
        for attr in node.attribute:
            if attr.name == "to" and attr.i == onnx.TensorProto.FLOAT:
                attr.i = number
    graph = model.graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = number


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded demo model in fp32, fp16 and bf16."""
    folder = tmp_path_factory.mktemp("demo")
    paths = {"fp32": demo_path() / "model.onnx"}
    for kind in _TYPES:
        model = onnx.load(paths["fp32"])
        _narrow(model, kind)
        paths[kind] = folder / f"{kind}.onnx"
        onnx.save(model, paths[kind])
    return paths


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Path, Edit], Path]:
    """A function that writes a changed copy of a model."""

    def write(path: Path, edit: Edit) -> Path:
        model = onnx.load(path)
        edit(model)
        onnx.save(model, tmp_path / "edited.onnx")
        return tmp_path / "edited.onnx"

    return write
