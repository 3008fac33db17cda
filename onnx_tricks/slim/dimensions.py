"""The shapes of values, written from those of other values, axis by axis."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.constants import evaluate, stored_tensor
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.slim.dependence import computed_from

__all__ = ["Dim", "Dimensions", "Length"]

Length = int | ir.Value | Sequence[tuple[ir.Value, int]]
"""A number, a tensor [1], or the sum of the lengths of axes of values."""

Dim = int | ir.Value
"""The length of an axis: a number, or a tensor [1]."""

_Dims = list[Dim]
_SAME = frozenset("Cast Clip Cos Dropout Exp Identity IsNaN Neg Not Sin Softmax Sqrt Tanh".split())
_BROADCAST = frozenset("Add And Div Equal Greater Less Max Min Mul Or Pow Sub Where".split())


class Dimensions:
    """Writes the shapes of values from those of values that are there anyway.

    Args:
        needed: Nodes whose results are needed for more than their shape.
        known: The shapes of some inputs.
        run: A dry run of the model, for ranks.
        going: Whether those inputs are to go, so that nothing may be computed from them.
    """

    def __init__(
        self,
        needed: set[ir.Node],
        known: Mapping[ir.Value, Sequence[Length]],
        run: DryRun,
        *,
        going: bool,
    ) -> None:
        self._needed, self._known, self._run = needed, known, run
        self._doomed = computed_from(known) if going else set()

    def at(self, build: Builder) -> Dimensions:
        """Begin anew, with nodes made in another place."""
        self._build = build
        self._made: dict[ir.Value, _Dims | None] = {}
        return self

    def tensor(self, dims: Sequence[Dim]) -> ir.Value:
        """A shape as a tensor [rank]."""
        if all(isinstance(one, int) for one in dims):
            return self._build.Constant(value_ints=dims)
        parts = (one if isinstance(one, ir.Value) else [one] for one in dims)
        return self._build.Concat(*parts, axis=0)

    def of(self, value: ir.Value) -> _Dims | None:
        """The shape of a value; None where it cannot be told without the value."""
        if value not in self._made:
            self._made[value] = self._make(value)
        return self._made[value]

    def _make(self, value: ir.Value) -> _Dims | None:
        if value in self._known:
            return [self._length(one) for one in self._known[value]]
        tensor = stored_tensor(value)
        if tensor is not None:
            return list(tensor.shape.numpy())
        node = value.producer()
        if node is None or node in self._needed:
            return self._read(value)
        make = _MAKERS.get(node.op_type) if node.domain == "" else None
        dims = None if make is None else make(self, node)
        if dims is not None and node.op_type == "Split":
            dims = self._part(dims, node, value)
        return self._read(value) if dims is None and value not in self._doomed else dims

    def _read(self, value: ir.Value) -> _Dims | None:
        """The shape of a value that is computed anyway."""
        shape = self._run.shape(value)
        rank = rank_of(value) if shape is None else len(shape)
        return None if rank is None else self._parts(self._build.Shape(value), rank)

    def _parts(self, tensor: ir.Value, count: int) -> _Dims:
        return [self._build.Slice(tensor, [i], [i + 1]) for i in range(count)]

    def _length(self, length: Length) -> Dim:
        if isinstance(length, int | ir.Value):
            return length
        build = self._build
        parts = [build.Slice(build.Shape(value), [axis], [axis + 1]) for value, axis in length]
        return functools.reduce(build.Add, parts)

    def _sum(self, dims: Sequence[Dim]) -> Dim:
        number = sum(one for one in dims if isinstance(one, int))
        values = [one for one in dims if isinstance(one, ir.Value)]
        if not values:
            return number
        total = functools.reduce(self._build.Add, values)
        return self._build.Add(total, [number]) if number else total

    def _product(self, dims: Sequence[Dim]) -> Dim:
        number = math.prod(one for one in dims if isinstance(one, int))
        values = [one for one in dims if isinstance(one, ir.Value)]
        if not values:
            return number
        total = functools.reduce(self._build.Mul, values)
        return total if number == 1 else self._build.Mul(total, [number])

    def same(self, node: ir.Node) -> _Dims | None:
        """Like its first input."""
        dims = None if node.inputs[0] is None else self.of(node.inputs[0])
        return None if dims is None else list(dims)

    def broadcast(self, node: ir.Node) -> _Dims | None:
        """The largest length along each axis."""
        found = [self.of(one) for one in node.inputs if one is not None]
        known = [one for one in found if one is not None]
        return functools.reduce(self._widest, known) if len(known) == len(found) else None

    def _widest(self, left: _Dims, right: _Dims) -> _Dims:
        short, long = sorted((left, right), key=len)
        padded = [*[1] * (len(long) - len(short)), *short]
        return [self._larger(*pair) for pair in zip(padded, long, strict=True)]

    def _larger(self, one: Dim, other: Dim) -> Dim:
        if one == 1 or one is other:
            return other
        if other == 1 or isinstance(one, int):
            return one
        return other if isinstance(other, int) else self._build.Max(one, other)

    def transpose(self, node: ir.Node) -> _Dims | None:
        """The axes in another order."""
        dims, perm = self.same(node), node.attributes.get("perm")
        if dims is None:
            return None
        return dims[::-1] if perm is None else [dims[axis] for axis in perm.as_ints()]

    def matmul(self, node: ir.Node) -> _Dims | None:
        """Rows of the left, columns of the right."""
        left, right = (None if one is None else self.of(one) for one in node.inputs)
        if left is None or right is None or len(left) < 2 or len(right) < 2:
            return None
        return [*self._widest(left[:-2], right[:-2]), left[-2], right[-1]]

    def gemm(self, node: ir.Node) -> _Dims | None:
        """Rows of the left, columns of the right, either of them turned."""
        found = [None if one is None else self.of(one) for one in node.inputs[:2]]
        left, right = found
        if left is None or right is None:
            return None
        turned = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
        return [left[1 if turned[0] else 0], right[0 if turned[1] else 1]]

    def gather(self, node: ir.Node) -> _Dims | None:
        """The axes of the indices in the place of one axis."""
        dims, indices = (None if one is None else self.of(one) for one in node.inputs)
        if dims is None or indices is None:
            return None
        axis = node.attributes.get_int("axis", 0) % len(dims)
        return [*dims[:axis], *indices, *dims[axis + 1 :]]

    def _part(self, dims: _Dims, node: ir.Node, part: ir.Value) -> _Dims | None:
        """The shape of one output of a Split."""
        axis, place = node.attributes.get_int("axis", 0) % len(dims), part.index()
        sizes = node.inputs[1] if len(node.inputs) > 1 else None
        known, whole = evaluate(sizes), dims[axis]
        if known is not None and place is not None:
            dims[axis] = int(known[place])
        elif sizes is None and isinstance(whole, int) and whole % len(node.outputs) == 0:
            dims[axis] = whole // len(node.outputs)
        else:
            return None
        return dims

    def concat(self, node: ir.Node) -> _Dims | None:
        """The sum along one axis."""
        found = [self.of(one) for one in node.inputs if one is not None]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        dims = list(known[0])
        axis = node.attributes["axis"].as_int() % len(dims)
        dims[axis] = self._sum([one[axis] for one in known])
        return dims

    def slice(self, node: ir.Node) -> _Dims | None:
        """What lies between two ends along each axis that is cut."""
        dims = self.same(node)
        starts, ends, axes, steps = (*node.inputs[1:], None, None)[:4]
        if dims is None or starts is None or ends is None:
            return None
        chosen = range(len(dims)) if axes is None else evaluate(axes)
        strides = [1] * len(dims) if steps is None else evaluate(steps)
        if chosen is None or strides is None or any(int(one) < 1 for one in strides):
            return None
        left = list(dims)
        for place, axis in enumerate(int(one) % len(dims) for one in chosen):
            start, end = (self._edge(one, place, left[axis]) for one in (starts, ends))
            left[axis] = self._between(start, end, int(strides[place]))
        return left

    def _edge(self, edges: ir.Value, place: int, length: Dim) -> Dim:
        """Where a slice begins or ends along an axis."""
        constant, build = evaluate(edges), self._build
        if constant is not None and isinstance(length, int):
            edge = int(constant[place])
            return min(max(edge + length, 0) if edge < 0 else edge, length)
        given = build.Cast(build.Slice(edges, [place], [place + 1]), to=ir.DataType.INT64)
        axis = length if isinstance(length, ir.Value) else [length]
        from_end = build.Max(build.Add(given, axis), [0])
        return build.Min(build.Where(build.Less(given, [0]), from_end, given), axis)

    def _between(self, start: Dim, end: Dim, step: int) -> Dim:
        build = self._build
        if isinstance(start, int) and isinstance(end, int):
            return len(range(start, end, step))
        first, last = (one if isinstance(one, ir.Value) else [one] for one in (start, end))
        length = build.Max(build.Sub(last, first), [0])
        return length if step == 1 else build.Div(build.Add(length, [step - 1]), [step])

    def reshape(self, node: ir.Node) -> _Dims | None:
        """The lengths that are asked for; -1 follows from the number of elements."""
        target, dims = node.inputs[1], self.same(node)
        numbers = self._run.array(target)
        if target is None or dims is None or numbers is None:
            return None
        if node.attributes.get_int("allowzero", 0):
            return None
        wanted = self._elements(target, len(numbers))
        # At any sizes -1 is -1 and 0 is 0: no exporter computes them.
        made: _Dims = [
            dims[i] if numbers[i] == 0 else 1 if numbers[i] == -1 else one
            for i, one in enumerate(wanted)
        ]
        if -1 in numbers:
            whole, part = self._product(dims), self._product(made)
            made[list(numbers).index(-1)] = self._quotient(whole, part)
        return made

    def _elements(self, vector: ir.Value, count: int) -> _Dims:
        """The numbers in a vector, one by one."""
        constant, node = evaluate(vector), vector.producer()
        if constant is not None:
            return [int(one) for one in constant]
        parts = [] if node is None else [one for one in node.inputs if one is not None]
        single = len(parts) == count and all(self._run.shape(one) == (1,) for one in parts)
        if node is not None and node.op_type == "Concat" and single:
            known = [evaluate(one) for one in parts]
            return [
                one if number is None else int(number[0])
                for one, number in zip(parts, known, strict=True)
            ]
        return self._parts(vector, count)

    def _quotient(self, whole: Dim, part: Dim) -> Dim:
        if isinstance(whole, int) and isinstance(part, int):
            return whole // part
        first, second = (one if isinstance(one, ir.Value) else [one] for one in (whole, part))
        return self._build.Div(first, second)

    def unsqueeze(self, node: ir.Node) -> _Dims | None:
        """With axes of length one in between."""
        dims, axes = self.same(node), self._run.array(node.inputs[1])
        if dims is None or axes is None:
            return None
        rank = len(dims) + len(axes)
        rest, places = iter(dims), {int(axis) % rank for axis in axes}
        return [1 if axis in places else next(rest) for axis in range(rank)]


_MAKERS: dict[str, Callable[[Dimensions, ir.Node], _Dims | None]] = {
    **dict.fromkeys(_SAME, Dimensions.same),
    **dict.fromkeys(_BROADCAST, Dimensions.broadcast),
    "Concat": Dimensions.concat,
    "Gather": Dimensions.gather,
    "Gemm": Dimensions.gemm,
    "MatMul": Dimensions.matmul,
    "Reshape": Dimensions.reshape,
    "Slice": Dimensions.slice,
    "Split": Dimensions.same,
    "Transpose": Dimensions.transpose,
    "Unsqueeze": Dimensions.unsqueeze,
}
