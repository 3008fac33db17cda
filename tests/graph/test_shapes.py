"""Shapes that are inferred: in branches, and behind what is reshaped at run time."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_tricks.graph.shapes import annotate, dim, rank_of

_FLOAT = onnx.TensorProto.FLOAT


def _branch(name: str, *shape: int) -> onnx.GraphProto:
    """A branch that reshapes x to a shape it puts together, by names that others use too."""
    nodes = [
        onnx.helper.make_node("Concat", ["batch", *(f"n{one}" for one in shape)], ["to"], axis=0),
        onnx.helper.make_node("Reshape", ["x", "to"], ["shaped"]),
        onnx.helper.make_node("Shape", ["shaped"], [f"{name}_out"]),
    ]
    output = onnx.helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.INT64, [None])
    return onnx.helper.make_graph(nodes, name, [], [output])


def _model(opset: int) -> ir.Model:
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["sizes"]),
        onnx.helper.make_node("Gather", ["sizes", "zero"], ["batch"]),
        onnx.helper.make_node(
            "If", ["c"], ["y"], then_branch=_branch("a", 2, 8), else_branch=_branch("b", 4, 2, 2)
        ),
    ]
    numbers = {"zero": 0, **{f"n{one}": one for one in (2, 4, 8)}}
    graph = onnx.helper.make_graph(
        nodes,
        "main",
        [
            onnx.helper.make_tensor_value_info("x", _FLOAT, ["b", 16]),
            onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
        ],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [None])],
        [onnx.numpy_helper.from_array(np.array([n]), name) for name, n in numbers.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets))


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_branches_that_share_names_have_their_own_ranks(opset: int) -> None:
    given = _model(opset)
    annotate(given)
    ranks = {
        graph.name: rank_of(node.outputs[0])
        for graph in given.graphs()
        for node in graph
        if node.op_type == "Reshape"
    }
    assert ranks == {"a": 3, "b": 4}


def test_shapes_go_on_behind_operators_of_the_runtime() -> None:
    given = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[b, 8, t] x, float[t] gain) => (float[b, t, 8] y) {
            h = com.microsoft.Gelu(x)
            z, m, v, s = com.microsoft.SkipLayerNormalization(h, x, gain)
            y = Transpose<perm = [0, 2, 1]>(s)
        }
        """
    )
    given.graph.node(1).outputs[1].name = given.graph.node(1).outputs[2].name = ""
    annotate(given)
    assert [rank_of(given.graph.node(index).outputs[0]) for index in (0, 1)] == [3, 3]
    assert rank_of(given.graph.node(1).outputs[3]) == 3


def test_large_constants_of_nodes_have_shapes() -> None:
    weight = onnx.numpy_helper.from_array(np.ones((64, 32), np.float32))
    constant = onnx.helper.make_node("Constant", [], ["w"], value=weight)
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (
        onnx.helper.make_tensor_value_info(name, _FLOAT, ["n", size])
        for name, size in (("x", 64), ("y", 32))
    )
    given = ir.from_proto(
        onnx.helper.make_model(onnx.helper.make_graph([constant, product], "g", [x], [y]))
    )
    annotate(given)
    assert dim(given.graph.node(0).outputs[0], 0) == 64


def test_operators_of_elsewhere_keep_nothing_for_their_names() -> None:
    given = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["": 17, "elsewhere": 1]>
        g (float[b, 8, t] x) => (float[n] y) {
            h = elsewhere.Gelu(x)
            y = Identity(h)
        }
        """
    )
    annotate(given)
    assert rank_of(given.graph.node(0).outputs[0]) is None
