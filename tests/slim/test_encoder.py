"""What a decoder does to an encoder's states goes into the weights that read them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.slim.encoder import find_encoded
from tests import toys

MASK = "m1 = Unsqueeze(mask, last) m = Cast<to=1>(m1) "
CHANGES = {
    "projected": "y = MatMul(states, w)",
    "projected with a bias": "p = MatMul(states, w) y = Add(p, c)",
    "projected and masked": f"p = MatMul(states, w) {MASK} y = Mul(p, m)",
    "with a bias and masked": f"p = MatMul(states, w) p1 = Add(p, c) {MASK} y = Mul(m, p1)",
    "masked": f"{MASK} y = Mul(states, m)",
}
REFUSED = {
    "normalised": "y = LayerNormalization<axis=-1>(states, g)",
    "masked before": f"{MASK} p = Mul(states, m) y = MatMul(p, w)",
    "projected twice": "p = MatMul(states, w_square) y = MatMul(p, w)",
    "squared": "p = MatMul(states, w) y = Mul(p, p)",
    "masked by tokens and channels": "m = Cast<to=1>(mask) p = MatMul(states, w) y = Mul(p, m)",
}


def _model(body: str, mask: str = "mask[2,5]") -> ir.Model:
    model = ir.from_proto(toys.model(body, inputs=f"states[2,5,D] {mask}"))
    annotate(model)
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_layers_behind_read_the_states_themselves(name: str) -> None:
    model = _model(CHANGES[name])
    encoded = find_encoded(model.graph.outputs[0])
    assert encoded is not None
    assert encoded.states.name == "states"
    assert not encoded.direct
    build = Builder(model.graph.append, lambda op_type: f"new/{op_type}")
    written = build.Identity(encoded.write(build, ir.DataType.FLOAT))
    written.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(written)
    proto = ir.to_proto(model)
    before, after = toys.run(proto, toys.feeds(proto))
    random = np.random.default_rng(1)
    weight, bias = random.standard_normal((before.shape[-1], 7)), random.standard_normal(7)
    own_weight, own_bias = encoded.behind(weight, bias)
    assert toys.error(after @ own_weight + own_bias, before @ weight + bias) < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_a_projection_is_refused(name: str) -> None:
    mask = "mask[2,5,12]" if "channels" in name else "mask[2,5]"
    assert find_encoded(_model(REFUSED[name], mask).graph.outputs[0]) is None
