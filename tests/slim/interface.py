"""Decoders as other tools leave them: other types, names and arrangements at their inputs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from onnx_tricks.graph.caches import find_caches
from onnx_tricks.graph.load import load_model

__all__ = [
    "cast_outside",
    "converted",
    "fixed",
    "four_bits",
    "named_alike",
    "renamed",
    "transposed",
    "without_names",
]

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def converted(source: Path, target: Path) -> Path:
    """A float32 model in half precision by ONNX Runtime's tool, its inputs and outputs kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that half precision cannot hold
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    target.parent.mkdir(exist_ok=True)
    onnx.save(model, target)
    return target


def four_bits(source: Path, target: Path) -> None:
    """Quantise the weights of a model's products to four bits each."""
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def cast_outside(source: Path) -> ir.Model:
    """A model in half precision whose inputs and outputs are cast, around its branches if any."""
    model = load_model(source).model
    graph = model.graph
    for value in [one for one in graph.inputs if one.dtype == HALF]:
        value.type = ir.TensorType(FLOAT)
        _behind(graph, value, "Cast", to=HALF)
    for index, value in enumerate(graph.outputs):
        if value.dtype == HALF:
            _before_output(graph, index, "Cast", to=FLOAT).type = ir.TensorType(FLOAT)
    return model


def transposed(source: Path, dtype: ir.DataType) -> ir.Model:
    """A model whose caches are [B, S, H, K] and perhaps of another type, and not [B, H, S, K]."""
    model = load_model(source).model
    graph, perm = model.graph, [0, 2, 1, 3]
    for value in find_caches(model):
        given = value.dtype
        value.shape, value.type = _permuted(value), ir.TensorType(dtype)
        inner = _behind(graph, value, "Transpose", perm=perm)
        if dtype != given:
            _behind(graph, inner, "Cast", to=given)
    for index, value in enumerate(graph.outputs):
        if "present" in (value.name or ""):
            shape = _permuted(value)
            moved = _before_output(graph, index, "Transpose", perm=perm)
            if dtype != value.dtype:
                moved.shape, moved.type = shape, value.type
                moved = _before_output(graph, index, "Cast", to=dtype)
            moved.shape, moved.type = shape, ir.TensorType(dtype)
    return model


def without_names(source: Path) -> ir.Model:
    """A model of whose inputs and outputs no open axis has a name."""
    return _changed(source, lambda _, __: None)


def named_alike(source: Path) -> ir.Model:
    """A model of whose inputs and outputs all open axes have one name."""
    return _changed(source, lambda _, __: "N")


def renamed(source: Path, past: str, present: str) -> ir.Model:
    """A model with other names of caches, by their number and what they are called behind it."""
    model = load_model(source).model
    for value in (*model.graph.inputs, *model.graph.outputs):
        told = re.fullmatch(r"(past_key_values|present)\.(\d+)\.(.*)", value.name or "")
        if told:
            side, layer, kind = told.groups()
            name = past if side == "past_key_values" else present
            value.name = name.format(layer, kind.replace(".", "_"))
    return model


def fixed(source: Path, past: int) -> ir.Model:
    """A model for one token behind so many others, and for nothing else."""
    return _changed(
        source, lambda axis, name: (past if axis and "past" in name else 1) + ("+" in name)
    )


def _changed(source: Path, change: Callable[[int, str], int | str | None]) -> ir.Model:
    """A model with other lengths of open axes, by the axis and its name."""
    model = load_model(source).model
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(
            dim if isinstance(dim, int) else change(axis, str(dim.value))
            for axis, dim in enumerate(value.shape)
        )
    return model


def _permuted(value: ir.Value) -> ir.Shape:
    return ir.Shape([value.shape[axis] for axis in (0, 2, 1, 3)])


def _behind(graph: ir.Graph, value: ir.Value, op_type: str, **attributes: object) -> ir.Value:
    """Let all readers of a value, also in branches, read what an operator makes of it."""
    readers = list(value.uses())
    node = ir.node(op_type, [value], attributes)
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(maker, node)
    for reader, index in readers:
        reader.replace_input_with(index, node.outputs[0])
    node.outputs[0].name = f"{value.name}/{op_type}"
    return node.outputs[0]


def _before_output(graph: ir.Graph, index: int, op_type: str, **attributes: object) -> ir.Value:
    """Let an output be what an operator makes of it, under its name."""
    value = graph.outputs[index]
    node = ir.node(op_type, [value], attributes)
    graph.append(node)
    made = node.outputs[0]
    made.name, made.shape = value.name, value.shape
    value.name = f"{value.name}/before/{op_type}"
    graph.outputs[index] = made
    return made
