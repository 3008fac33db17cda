"""Fixed noise in place of random numbers, so that two runs of a model can be compared."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.shapes import dtype_of

__all__ = ["steady"]

_UNIFORM = frozenset({"RandomUniform", "RandomUniformLike"})
_NORMAL = frozenset({"RandomNormal", "RandomNormalLike"})
_LEVELS = 2**20  # values of the noise; each is the same number in float32 and float64
_STEP = 648_055  # odd, and near the golden ratio of the levels: the values spread evenly
_WIDTH = 3.5  # of uniform noise whose deviation is about 1


def steady(model: ir.Model) -> bool:
    """Replace what draws random numbers, in place, by noise that only depends on its shape.

    Args:
        model: The model.

    Returns:
        Whether it drew any.
    """
    drawing = [node for node in model.graph.all_nodes() if node.op_type in _UNIFORM | _NORMAL]
    for node in drawing:
        nodes = _noise(node)
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, nodes)
        old, new = node.outputs[0], nodes[-1].outputs[0]
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = None, old.name
        graph.remove(node)
    return bool(drawing)


def _noise(node: ir.Node) -> list[ir.Node]:
    """Write ``offset + scale * (i * step mod levels)``, i the index of an element."""
    nodes: list[ir.Node] = []

    def made(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(op, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def constant(array: np.ndarray) -> ir.Value:
        nodes.append(ir.node("Constant", [], {"value": ir.tensor(array)}))
        return nodes[-1].outputs[0]

    if node.inputs and node.inputs[0] is not None:
        shape, dtype = made("Shape", node.inputs[0]), dtype_of(node.inputs[0])
    else:
        shape, dtype = constant(np.array(node.attributes["shape"].as_ints(), np.int64)), None
    if "dtype" in node.attributes:
        dtype = ir.DataType(node.attributes["dtype"].as_int())
    zero, one, step, levels = (constant(np.array(n)) for n in (0, 1, _STEP, _LEVELS))
    count = made("ReduceProd", shape, keepdims=0)
    level = made("Mod", made("Mul", made("Range", zero, count, one), step), levels)
    numbers = made("Cast", level, to=int(ir.DataType.FLOAT))
    offset, scale = _span(node)
    numbers = made("Mul", numbers, constant(np.array(scale / _LEVELS, np.float32)))
    numbers = made("Add", numbers, constant(np.array(offset, np.float32)))
    made("Reshape", made("Cast", numbers, to=int(dtype or ir.DataType.FLOAT)), shape)
    return nodes


def _span(node: ir.Node) -> tuple[float, float]:
    """The least number that a node may draw, and how far the others lie above it."""

    def attribute(name: str, default: float) -> float:
        return node.attributes[name].as_float() if name in node.attributes else default

    if node.op_type in _UNIFORM:
        low, high = attribute("low", 0.0), attribute("high", 1.0)
        return low, high - low
    width = _WIDTH * attribute("scale", 1.0)
    return attribute("mean", 0.0) - width / 2, width
