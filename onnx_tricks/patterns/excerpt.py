"""The part of a region that is to be stored, as a model of its own.

Its inputs are rows of the tables that the token ids look up, its outputs the rows to store, for a
fixed number of tokens: the shapes that the graph works out from its inputs are constants here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.constants import evaluate, stored_tensor
from onnx_tricks.graph.edit import ChangedTensor
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.patterns.cut import Cut
from onnx_tricks.patterns.layout import Layout, Length, length_of
from onnx_tricks.patterns.lengths import Sizes
from onnx_tricks.patterns.region import Operation, Region
from onnx_tricks.patterns.states import Row
from onnx_tricks.patterns.weight import trace_weight

__all__ = ["Excerpt", "Rows", "cut_out"]

_Array = np.ndarray[Any, np.dtype[Any]]
Rows = Callable[[slice], _Array]
_SHAPED = frozenset(("Expand", "Reshape"))
_ROW_BY_ROW = frozenset(("Cast", "Identity"))
_NEWEST_IR = 10  # what all runtimes read; a model may be written for a newer one than is here


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """A part of a model that computes rows for some tokens.

    Attributes:
        model: The part; no value of it belongs to the model it comes from.
        sources: For each input, how to read rows of its table.
        shapes: For each input, its shape.
        outputs: Names of the outputs, of [tokens, numbers], by the keys of the rows they are.
    """

    model: ir.Model
    sources: Mapping[str, Rows]
    shapes: Mapping[str, tuple[int, ...]]
    outputs: Mapping[int, str]


def cut_out(model: ir.Model, region: Region, cut: Cut, keys: Iterable[int], tokens: int) -> Excerpt:
    """Cut the computation of some of the stored rows out of a model.

    bfloat16, for which ONNX Runtime has no kernels on every processor, becomes float32.

    Args:
        model: The model; it is not changed.
        region: The region.
        cut: What is stored of it.
        keys: Which of the stored rows.
        tokens: For how many tokens.
    """
    writer = _Writer(region, cut, tokens)
    outputs = {key: writer.result(key) for key in keys}
    graph = ir.Graph(
        writer.inputs,
        list(outputs.values()),
        nodes=writer.nodes,
        initializers=writer.initializers,
        opset_imports=dict(model.opset_imports),
        name="first_layer",
    )
    return Excerpt(
        ir.Model(graph, ir_version=min(model.ir_version, _NEWEST_IR)),
        writer.sources,
        writer.shapes,
        {key: value.name or "" for key, value in outputs.items()},
    )


class _Writer:
    """Copies operations, from what is wanted back to the lookups."""

    def __init__(self, region: Region, cut: Cut, tokens: int) -> None:
        self._region = region
        self._lengths = dict.fromkeys(region.axes, 1) | {region.axes[-1]: tokens}
        self._makers: dict[int, Operation] = {
            key: one for one in region.operations for key in one.outputs if key is not None
        }
        self._joins = {join.key: join for join in cut.joins}
        self._rows: dict[int, ir.Value] = {}
        self._constants: dict[ir.Value, ir.Value] = {}
        self._count = 0
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.sources: dict[str, Rows] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._build = Builder(self.nodes.append, self._name)

    def result(self, key: int) -> ir.Value:
        """Write a row with its tokens in front, [tokens, numbers]."""
        row = self._region.row(self._joins[key].rows[0] if key in self._joins else key)
        value = self.row(key)
        factors = [factor for axis in row.layout for factor in axis]
        order = sorted(range(len(factors)), key=lambda one: isinstance(factors[one], int))
        if order != sorted(order):
            apart = self._shape(tuple((factor,) for factor in factors))
            value = self._build.Transpose(self._build.Reshape(value, apart), perm=order)
        tokens = self._shape((tuple(self._region.axes),))
        return _typed(self._build.Reshape(value, [*tokens, row.width]), row.dtype)

    def row(self, key: int) -> ir.Value:
        """Write what a row is computed from, and return the row."""
        if key not in self._rows:
            if key in self._joins:
                first, *rest = (self.row(one) for one in self._joins[key].rows)
                for other in rest:
                    first = self._build.Add(first, other)
                self._rows[key] = _typed(first, self._region.row(self._joins[key].rows[0]).dtype)
            elif self._makers[key].lookup:
                self._rows[key] = self._table(self._makers[key], self._region.row(key))
            else:
                self._operation(self._makers[key])
        return self._rows[key]

    def _operation(self, operation: Operation) -> None:
        node = operation.node
        inputs = [self._operand(node, index) for index in range(len(node.inputs))]
        attributes = [_raised_attribute(one) for one in node.attributes.values()]
        outputs = self._build.node(node.domain, node.op_type, inputs, attributes, len(node.outputs))
        for key, output in zip(operation.outputs, outputs, strict=False):
            if key is not None:
                self._rows[key] = _typed(output, self._region.row(key).dtype)

    def _operand(self, node: ir.Node, index: int) -> ir.Value | None:
        value = node.inputs[index]
        if value is None:
            return None
        state = self._region.states[value]
        if index == 1 and node.op_type in _SHAPED and node.domain == "":
            made = self._region.states[node.outputs[0]]
            assert isinstance(made, Row)
            return self._numbers(self._shape(made.layout))
        if isinstance(state, Row):
            return self.row(state.key)
        return self._constant(value)

    def _table(self, operation: Operation, row: Row) -> ir.Value:
        table = operation.node.inputs[0]
        assert table is not None
        name, shape = self._name("rows"), self._shape(row.layout)
        self.sources[name], self.shapes[name] = _rows_of(table), shape
        value = ir.Value(name=name, shape=ir.Shape(shape))
        self.inputs.append(_typed(value, row.dtype))
        return value

    def _constant(self, value: ir.Value) -> ir.Value:
        if value not in self._constants:
            self._constants[value] = self._new_constant(value)
        return self._constants[value]

    def _new_constant(self, value: ir.Value) -> ir.Value:
        state, tensor = self._region.states.get(value), stored_tensor(value)
        if tensor is not None:
            name, copy = self._name("constant"), _copied(tensor)
            made = ir.Value(name=name, shape=ir.Shape(copy.shape.numpy()), const_value=copy)
            self.initializers.append(_typed(made, copy.dtype))
            return made
        if isinstance(state, Sizes):
            numbers = [self._number(one) for one in state.entries if one is not None]
            dtype = dtype_of(value) or ir.DataType.INT64
            return self._numbers(numbers[0] if state.scalar else numbers, dtype)
        node = value.producer()
        assert node is not None
        inputs = [None if one is None else self._constant(one) for one in node.inputs]
        attributes = [_raised_attribute(one) for one in node.attributes.values()]
        outputs = self._build.node(node.domain, node.op_type, inputs, attributes, len(node.outputs))
        self._constants.update(zip(node.outputs, outputs, strict=True))
        return self._constants[value]

    def _numbers(self, numbers: object, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        array = np.asarray(numbers, dtype=dtype.numpy())
        name = self._name("shape")
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor)
        self.initializers.append(_typed(value, dtype))
        return value

    def _shape(self, layout: Layout) -> tuple[int, ...]:
        return tuple(self._number(length_of(axis)) for axis in layout)

    def _number(self, length: Length) -> int:
        number = length.factor
        for symbol in length.symbols:
            number *= self._lengths[symbol]
        return number

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}.{self._count}"


def _rows_of(table: ir.Value) -> Rows:
    """How to read rows of a table without holding it whole; it works when the graph is gone."""
    tensor = stored_tensor(table)
    if tensor is not None:
        return _reader(tensor)
    weight = trace_weight(table, 0)
    if weight is None or not weight.readable:
        array = evaluate(table)
        assert array is not None
        return lambda rows: array[rows]
    stored, steps = weight.tensor, [one for one in weight.steps if one is not None]
    by_row = all(node.op_type in _ROW_BY_ROW for node in weight.path)
    read = _reader(stored) if by_row else lambda _: stored.numpy()

    def rows_of(rows: slice) -> _Array:
        part = read(rows)
        for function in steps:
            part = function(part)
        return part if by_row else part[rows]

    return rows_of


def _reader(tensor: ir.TensorProtocol) -> Rows:
    if isinstance(tensor, ChangedTensor):
        return tensor.rows
    return lambda rows: tensor.numpy()[rows]


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    value.type = ir.TensorType(_raised(dtype))
    return value


def _raised(dtype: ir.DataType) -> ir.DataType:
    return ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype


def _copied(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same numbers in a tensor of their own, which a value may name as it likes."""
    dtype = _raised(tensor.dtype)

    def data() -> ir.TensorProtocol:
        if tensor.dtype == dtype:
            return tensor
        return ir.Tensor(tensor.numpy().astype(dtype.numpy()))

    return ir.LazyTensor(data, dtype, ir.Shape(tensor.shape.numpy()))


def _raised_attribute(attribute: ir.Attr) -> ir.Attr:
    if attribute.name in ("to", "dtype") and attribute.type == ir.AttributeType.INT:
        dtype = ir.DataType(attribute.as_int())
        return ir.AttrInt64(attribute.name, _raised(dtype))
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.AttrTensor(attribute.name, _copied(attribute.as_tensor()))
    return ir.Attr(attribute.name, attribute.type, attribute.value)
