"""defer-norm: rows are divided by their size behind the linear layers, not in front of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import scalar
from onnx_tricks.graph.edit import add_constant, insert, insert_after, shared_constant
from onnx_tricks.graph.shapes import dim, dtype_of, rank_of
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.linear import Linear, find_linear
from onnx_tricks.patterns.norm import Norm
from onnx_tricks.patterns.norms import find_norms
from onnx_tricks.patterns.projection import bias_of, matrix_of
from onnx_tricks.patterns.readers import find_readers
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.runtime.activations import observe

__all__ = ["DeferNorm"]

_Array = np.ndarray[Any, np.dtype[Any]]
_PRODUCTS = frozenset(("FusedMatMul", "Gemm", "MatMul"))
_HALF = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))
_MARGIN = 8  # products of other rows than those seen may be so much larger
_AXES_ARE_INPUTS = 18  # the first opset in which those of ReduceSumSquare are


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A value that is to be scaled row by row.

    Attributes:
        value: The value.
        width: Its number of channels.
        flat: Whether its rows lie on one axis.
        power: With which power of the scale: two where both factors of a product had to be.
    """

    value: ir.Value
    width: int
    flat: bool = False
    power: int = 1


@dataclasses.dataclass(frozen=True)
class Deferral(Site):
    """One norm whose division moves behind the linear layers that read it.

    Attributes:
        norm: The norm.
        readers: The linear layers.
        products: What is scaled in place of the rows.
    """

    norm: Norm | None = None
    readers: tuple[Linear, ...] = ()
    products: tuple[Product, ...] = ()

    def details(self) -> list[dict[str, Any]]:
        """How many numbers of a row are scaled, before and after."""
        assert self.norm is not None
        after = sum(one.width for one in self.products)
        return [{"node": self.node, "scaled_before": self.norm.width, "scaled_after": after}]


@dataclasses.dataclass(frozen=True)
class DeferNorm(Pass):
    """Divide by the root mean square behind the linear layers that read an RMSNorm.

    ``(x / sqrt(sum(x^2) / D + eps)) W + b  ==>  (x W) * s + b``
    ``s = sqrt(D) / sqrt(sum(x^2) + D eps)``

    Shapes: x [..., D], W [D, F], b [F], s [..., 1], one for all readers of the norm.
    Exact: in real arithmetic; no weight changes.
    Applies when: the norm has no gain any more (fold-norm) and every reader is a product with one
    matrix. In float16 also when the products of rows that are not normalised stay in range.
    Saves: nothing in plain ONNX, where it costs the multiplication of F numbers in place of D and a
    fused norm (`benchmarks/defer_norm.py`). Product and statistic no longer wait for each other,
    which one operator for both could use (`onnx_tricks/operators/norm_linear.py`).
    In a gated feed-forward block the scale of the other factor moves to the output, from F numbers
    to D; where the gate is a ReLU or there is none, that of both does, squared.
    Source: arXiv:2407.09577, sections 2 and 3.
    """

    name: ClassVar[str] = "defer-norm"
    summary: ClassVar[str] = (
        "Divide by the root mean square behind linear layers; saves no time yet."
    )
    default: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the norms whose division can be deferred, and why that of others cannot."""
        extents = Extents()
        found: list[tuple[Norm, tuple[Linear, ...], tuple[Product, ...]]] = []
        for norm in find_norms(model):
            if not isinstance(norm, Norm) or norm.kind != "rms" or norm.axis != -1:
                continue
            label = norm.node.name or norm.node.outputs[0].name or norm.node.op_type
            read = _reason(norm) or _products(norm, extents)
            if isinstance(read, str):
                yield Skip(label, read)
            else:
                found.append((norm, *read))
        halves = [norm.source for norm, *_ in found if norm.dtype == ir.DataType.FLOAT16]
        seen = observe(model, halves) if halves else {}
        for norm, readers, products in found:
            label = norm.node.name or norm.node.outputs[0].name or norm.node.op_type
            reason = _range_reason(norm, readers, seen)
            if reason:
                yield Skip(label, reason)
                continue
            yield Deferral(
                label,
                inputs=(norm.source.name or "",),
                outputs=tuple(one.value.name or "" for one in products),
                norm=norm,
                readers=readers,
                products=products if norm.dtype in _HALF else _carried(products),
            )

    def apply(self, model: ir.Model, site: Site) -> None:
        """Let the linear layers read the rows as they are, and scale what they compute."""
        assert isinstance(site, Deferral)
        assert site.norm is not None
        norm = site.norm
        scales = _Scales(model, norm)
        for linear in site.readers:
            if linear.bias_index is not None and linear.bias is not None:
                _separate_bias(model, linear)
        for product in site.products:
            insert_after(model, product.value, "Mul", scales.get(product.power, product.flat))
        norm.output.replace_all_uses_with(norm.read)


class _Scales:
    """The scale of a norm's rows, and its powers, each written once and in front of the norm."""

    def __init__(self, model: ir.Model, norm: Norm) -> None:
        self.model, self.norm = model, norm
        self.type = ir.DataType.FLOAT if norm.dtype in _HALF else norm.dtype
        self.stem = f"{norm.node.name or norm.output.name}/deferred"
        self.made: dict[tuple[int, bool], ir.Value] = {}
        self.total: ir.Value | None = None

    def get(self, power: int, flat: bool) -> ir.Value:
        """`s` or its square, [..., 1] or [rows, 1], of the type of the norm."""
        if (power, flat) in self.made:
            return self.made[power, flat]
        if flat:
            column = shared_constant(self.model, "column", np.array([-1, 1]))
            value = self.put("Reshape", self.get(power, False), column, dtype=self.norm.dtype)
        else:
            divisor = self.sum_of_squares()
            if power == 1:
                divisor = self.put("Sqrt", divisor)
            numerator = self.number(self.norm.width ** (power / 2))
            value = self.cast(self.put("Div", numerator, divisor), self.norm.dtype)
        return self.made.setdefault((power, flat), value)

    def sum_of_squares(self) -> ir.Value:
        if self.total is None:
            rows = self.cast(self.norm.read, self.type)
            if self.model.opset_imports.get("", 1) < _AXES_ARE_INPUTS:
                total = self.put("ReduceSumSquare", rows, axes=[-1], keepdims=1)
            else:
                axes = shared_constant(self.model, "last_axis", np.array([-1]))
                total = self.put("ReduceSumSquare", rows, axes, keepdims=1)
            epsilon = self.number(self.norm.width * self.norm.epsilon)
            self.total = self.put("Add", total, epsilon)
        return self.total

    def put(
        self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        listed = ir.convenience.convert_attributes(attributes)
        name = f"{self.stem}/{op_type}"
        return insert(
            self.norm.node,
            op_type,
            inputs,
            name=name,
            model=self.model,
            dtype=dtype or self.type,
            attributes=listed,
        )

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (dtype_of(value) or self.norm.dtype) == dtype:
            return value
        return self.put("Cast", value, dtype=dtype, to=int(dtype))

    def number(self, number: float) -> ir.Value:
        array = np.asarray(number, dtype=self.type.numpy())
        label = f"number.{array[()]!s}.{self.type.name.lower()}"
        return shared_constant(self.model, label, array)


def _reason(norm: Norm) -> str:
    """Why a norm's division stays where it is; empty when its readers decide."""
    if norm.node.op_type.startswith("Skip"):
        return "it adds and normalises in one operator"
    if not norm.plain:
        return "its gain would have to stay in front: fold-norm moves it into the weights"
    if dtype_of(norm.source) not in (None, norm.dtype):
        return "its rows are of another type than what is read from it"
    return ""


def _products(norm: Norm, extents: Extents) -> tuple[tuple[Linear, ...], tuple[Product, ...]] | str:
    """The linear layers that read a norm, and their products; or what else reads it."""
    readers = find_readers(norm.output, norm.axis, norm.width, extents)
    if readers.obstacles:
        return f"{readers.obstacles[0]}, so that it has to be divided before"
    if not readers.linear:
        return "no linear layer reads it"
    products = []
    for reader in readers.linear:
        linear, node = reader.linear, reader.linear.node
        label = f"{node.op_type} {node.name or node.outputs[0].name!r}"
        flat = _is_flat(node.inputs[0], norm.output)
        plain = node.op_type in _PRODUCTS and linear.weight_index == 1 and linear.weight.rank == 2
        if not plain or not linear.weight.readable:
            return f"{label} is no product of rows with one matrix"
        if flat is None or reader.channels.width != norm.width:
            return f"{label} reads rows in another order, or parts of them"
        width = matrix_of(linear).shape[1]
        products.append(Product(node.outputs[0], width, flat))
    return tuple(one.linear for one in readers.linear), tuple(products)


def _is_flat(value: ir.Value | None, rows: ir.Value) -> bool | None:
    """Whether a value is the rows on one axis, not as they are; None where it is neither."""
    flat = False
    while value is not rows:
        node = value.producer() if value is not None else None
        if value is None or node is None or node.domain != "" or flat:
            return None
        if node.op_type in ("Flatten", "Reshape") and rank_of(value) == 2 and rank_of(rows) == 3:
            flat = True
        elif node.op_type in ("Div", "Mul"):
            if scalar(node.inputs[1]) is None:
                return None
        elif node.op_type not in ("Cast", "Identity") or dtype_of(value) != dtype_of(rows):
            return None
        value = node.inputs[0]
    return flat


def _range_reason(
    norm: Norm, readers: Sequence[Linear], seen: Mapping[ir.Value, _Array] | None
) -> str:
    """Why products of rows that are not normalised may leave the range of float16."""
    if norm.dtype != ir.DataType.FLOAT16:
        return ""
    if seen is None or norm.source not in seen:
        return "products of its rows may leave the range of FLOAT16, and cannot be looked at here"
    rows = seen[norm.source].reshape(-1, norm.width).astype(np.float64)
    largest = max(float(np.abs(rows @ matrix_of(one).astype(np.float64)).max()) for one in readers)
    if _MARGIN * largest < float(np.finfo(np.float16).max):
        return ""
    return f"products of its rows reach {largest:.3g} on seeded tokens, too near the end of FLOAT16"


def _carried(products: Sequence[Product]) -> tuple[Product, ...]:
    """Scales moved on to where fewer numbers are to be scaled, through what keeps them factors."""
    result = list(products)
    for one in products:
        if one not in result:
            continue
        members, value = [one], one.value
        reader = _only_reader(value)
        while reader is not None and reader.op_type in ("Mul", "Relu"):
            if reader.op_type == "Mul":
                other = reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0]
                if other is value or not _alike(other, value):
                    break
                members += [two for two in result if two is not one and _leads_to(two, other)]
            value = reader.outputs[0]
            reader = _only_reader(value)
        if reader is None or reader.op_type != "MatMul" or reader.inputs[0] is not value:
            continue
        linear = find_linear(reader, 0, -1)
        if isinstance(linear, Linear) and linear.weight.rank == 2 and linear.weight.readable:
            width = matrix_of(linear).shape[1]
            if width < sum(two.width for two in members):
                result = [two for two in result if two not in members]
                result.append(Product(reader.outputs[0], width, one.flat, len(members)))
    return tuple(result)


def _alike(one: ir.Value | None, other: ir.Value) -> bool:
    """Whether two values have as many axes and channels, so that neither is spread."""
    if one is None or dim(one, -1) is None:
        return False
    return dim(one, -1) == dim(other, -1) and rank_of(one) == rank_of(other)


def _leads_to(product: Product, value: ir.Value | None) -> bool:
    """Whether a value is a product, perhaps behind a ReLU, and nothing else reads it."""
    current: ir.Value | None = product.value
    while current is not None and current is not value:
        reader = _only_reader(current)
        current = reader.outputs[0] if reader is not None and reader.op_type == "Relu" else None
    return current is not None and _only_reader(current) is not None


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    alone = len(uses) == 1 and not value.is_graph_output() and uses[0].node.domain == ""
    return uses[0].node if alone else None


def _separate_bias(model: ir.Model, linear: Linear) -> None:
    """Let an Add hold the bias of a Gemm: what it multiplies is scaled before."""
    node, held = linear.node, linear.bias
    bias = bias_of(linear)
    assert bias is not None
    assert held is not None
    assert linear.bias_index is not None
    if node.attributes.get_float("beta", 1.0) != 1.0:
        dtype = dtype_of(node.outputs[0]) or linear.weight.tensor.dtype
        tensor = ir.Tensor(bias.astype(dtype.numpy()))
        held = add_constant(model, f"{held.name}/deferred", tensor)
    node.replace_input_with(linear.bias_index, None)
    insert_after(model, node.outputs[0], "Add", held)
