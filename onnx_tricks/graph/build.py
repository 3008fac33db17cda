"""Write nodes as expressions: `build.Add(x, y)` makes the node and returns its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["Builder"]

Operand = ir.Value | int | Sequence[int] | np.ndarray[Any, np.dtype[Any]] | None


class Builder:
    """Makes one-output nodes of the default domain.

    Every operator is a method: operands are positional, attributes are keywords. Integers and
    sequences of them become int64 constants, arrays constants of their own type; None is an
    absent operand.

    Args:
        place: Takes every node in order, such as `list.append`.
        name: Makes a unique name of an operator's.
    """

    def __init__(self, place: Callable[[ir.Node], object], name: Callable[[str], str]) -> None:
        self._place, self._name = place, name

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def make(*operands: Operand, **attributes: Any) -> ir.Value:
            inputs = [self._value(operand) for operand in operands]
            converted = ir.convenience.convert_attributes(attributes)
            return self.node("", op_type, inputs, converted, 1)[0]

        return make

    def node(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr],
        outputs: int,
    ) -> Sequence[ir.Value]:
        """Make a node of any domain and number of outputs; return its outputs."""
        name = self._name(op_type)
        node = ir.Node(
            domain,
            op_type,
            inputs,
            attributes,
            num_outputs=outputs,
            name=name,
        )
        for index, output in enumerate(node.outputs):
            output.name = name if outputs == 1 else f"{name}.{index}"
        self._place(node)
        return node.outputs

    def _value(self, operand: Operand) -> ir.Value | None:
        if operand is None or isinstance(operand, ir.Value):
            return operand
        if not isinstance(operand, np.ndarray):
            operand = np.asarray(operand, dtype=np.int64)
        return self.node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(operand))], 1)[0]
