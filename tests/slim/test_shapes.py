"""Shapes of what is no longer computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from onnx_tricks.graph.edit import remove_dead_nodes
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.models import demo_path
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import SlimAttention
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.runtime.sessions import Session
from onnx_tricks.slim.shapes import free_shapes

HEAVY = {"Exp", "MatMul", "Neg", "Transpose"}


def _model(body: str) -> ir.Model:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[b, s, 12] x, float[b, p, 12] y) => (int64[n] shape) {{ {body}
    final = Shape(last) shape = Identity(final) }}"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(parser.parse_model(text)))
    annotate(model)
    return model


@pytest.mark.parametrize(
    "body",
    [
        "last = Transpose <perm = [2, 0, 1]> (x)",
        "a = Exp(x) b = Neg(y) last = Concat <axis = -2> (a, b)",
        """a = Exp(x) s = Constant <value_ints = [0, 0, 3, -1]> () b = Reshape(a, s)
        last = Transpose <perm = [0, 2, 1, 3]> (b)""",
        """a = Exp(x) l = Constant <value_ints = [1, -7]> () h = Constant <value_ints = [99, -1]> ()
        i = Constant <value_ints = [1, 2]> () t = Constant <value_ints = [1, 2]> ()
        last = Slice(a, l, h, i, t)""",
        """a = Exp(x) z = Shape(x) i = Constant <value_ints = [2]> () w = Gather(z, i)
        t = Constant <value_ints = [2]> () h = Div(w, t) e = Constant <value_ints = [9999]> ()
        last = Slice(a, h, e, t)""",
        """a = Exp(x) z = Shape(x) o = Constant <value_ints = [0]> () n = Gather(z, o)
        m = Constant <value_ints = [-1]> () f = Constant <value_ints = [4]> ()
        s = Concat <axis = 0> (n, m, f) last = Reshape(a, s)""",
        """a = Exp(x) b = Transpose <perm = [0, 2, 1]> (y) c = MatMul(a, b)
        i = Constant <value_ints = [1]> () last = Unsqueeze(c, i)""",
    ],
)
def test_a_shape_is_the_same_without_its_value(body: str) -> None:
    model, freed = _model(body), _model(body)
    free_shapes(freed, {}, DryRun(freed))
    remove_dead_nodes(freed)
    assert not HEAVY & {node.op_type for node in freed.graph}
    for sizes in ((2, 5, 3), (1, 1, 7), (3, 8, 1)):
        batch, tokens, past = sizes
        feeds = {"x": np.ones((batch, tokens, 12)), "y": np.ones((batch, past, 12))}
        expected = Session(model).run(feeds)["shape"]
        assert Session(freed).run(feeds)["shape"].tolist() == expected.tolist()


def test_nothing_of_the_old_keys_and_values_stays(tmp_path: Path) -> None:
    source = demo_path() / "model.onnx"
    report = optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()], verify=False).report
    ranks = [row["rank"] for row in report.passes[0].details]
    # Beside the residual: its projection and its way back to the values, and three vectors.
    more = sum(2 * 192 * rank + 3 * 192 for rank in ranks)
    assert report.after.parameters - report.before.parameters <= more + 64
