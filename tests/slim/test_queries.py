"""Queries in whatever arrangement are written as their operator reads them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnx_tricks.graph.build import Builder
from onnx_tricks.slim.queries import heads_first

SHAPE = {"b": 2, "h": 3, "s": 5, "k": 4}


@pytest.mark.parametrize(
    "axes",
    [
        ("b", "h", "s", "k"),
        ("b", "s", "hk"),
        ("bh", "s", "k"),
        ("b", "sh", "k"),
        ("b", "hs", "k"),
        ("s", "bh", "k"),
    ],
)
def test_heads_of_every_arrangement_come_first(axes: tuple[str, ...]) -> None:
    letters = "".join(axes)
    heads = np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 5, 4)
    lengths = [int(np.prod([SHAPE[letter] for letter in one])) for one in axes]
    given = heads.transpose(["bhsk".index(letter) for letter in letters]).reshape(lengths)
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(lengths))
    nodes: list[ir.Node] = []
    build = Builder(nodes.append, lambda op_type: f"{op_type}.{len(nodes)}")
    result = build.Identity(heads_first(build, value, axes, SHAPE["h"]))
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([value], [result], nodes=nodes, opset_imports={"": 18})
    proto = ir.to_proto(ir.Model(graph, ir_version=9))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {"x": given})[0], heads)
