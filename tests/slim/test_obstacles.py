"""What a decoder returns beside its caches, and why it then keeps a layer as it is."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.save import save_model
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import SlimAttention
from tests.conftest import Export


@pytest.mark.parametrize(
    ("exporter", "operator", "place"),
    [("optimum", "Softmax", 0), ("dynamo23-cache", "Attention", 3)],
)
def test_a_layer_whose_attention_weights_are_returned_is_left_and_the_others_are_not(
    exporter: str, operator: str, place: int, export: Export, tmp_path: Path
) -> None:
    model = load_model(export("gpt_neox", exporter) / "model.onnx").model
    node = next(one for one in model.graph if one.op_type == operator)
    node.resize_outputs(max(place + 1, len(node.outputs)))
    for output in node.outputs:
        output.name = output.name or ""  # left out
    weights = node.outputs[place]
    weights.name, weights.type = "attentions.0", ir.TensorType(ir.DataType.FLOAT)
    weights.shape = ir.Shape(["batch", 4, "tokens", "total"])
    model.graph.outputs.append(weights)
    save_model(model, tmp_path / "weights.onnx")
    report = optimize(tmp_path / "weights.onnx", None, passes=[SlimAttention()]).report
    (slim,) = report.passes
    assert (slim.applied, report.verification.status) == (1, "passed")
    (skip,) = slim.skipped
    assert "'attentions.0', made of its attention weights, is an output too" in skip.reason
