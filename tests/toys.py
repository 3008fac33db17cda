"""Toy graphs written as ONNX text, with seeded weights, and the means to run them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime

D, F, V = 16, 12, 20
TYPES = {
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
}
ONNX_TYPES = {"float": 1, "float16": 10, "double": 11, "bfloat16": 16}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Every constant that a toy graph may name, in float64."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    return {
        "g": 1 + 0.5 * normal(D),
        "g1": 0.5 * normal(D),
        "g3": (1 + 0.5 * normal(D)).reshape(1, 1, D),
        "g_channel": (1 + 0.5 * normal(D)).reshape(D, 1),
        "g_matrix": 1 + 0.5 * normal((4, D)),
        "beta": 0.3 * normal(D),
        "beta_channel": (0.3 * normal(D)).reshape(D, 1),
        "w": normal((D, F)) / 4,
        "w2": normal((D, F)) / 4,
        "w_square": normal((D, D)) / 4,
        "w_transposed": normal((F, D)) / 4,
        "w_packed": normal((D, 3 * D)) / 4,
        "w_experts": normal((3, D, F)) / 4,
        "w_half_channels": normal((D // 2, F)) / 4,
        "w_vector": normal(D) / 4,
        "w_conv": normal((F, D, 1)),
        "w_conv3": normal((F, D, 3)) / 4,
        "w_grouped": normal((F, D // 2, 1)) / 4,
        "table": normal((V, D)),
        "c": 0.3 * normal(F),
        "c_packed": 0.3 * normal(3 * D),
        "ones": np.ones(D),
        "zeros": np.zeros(D),
        "one": np.ones(()),
        "zero": np.zeros(()),
        "two": np.full((), 2.0),
        "half": np.full((), 0.5),
        "minus_half": np.full((), -0.5),
        "eps": np.full((), 1e-5),
        "width": np.full((), float(D)),
        "inverse_width": np.full((), 1.0 / D),
        "root_width": np.full((), float(np.sqrt(D))),
        "w_twice": normal((2 * D, F)) / 4,
        "w_map": normal((F, D, 1, 1)) / 4,
        "w_map3": normal((F, D, 3, 1)) / 4,
        "w_each": normal((D, 1, 3, 1)) / 4,
        "w_up": normal((D, F, 3)) / 4,
        "w_gates": normal((1, 12, D)) / 4,
        "w_states3": normal((1, 12, 4)) / 4,
        "w_states4": normal((1, 12, 3)) / 4,
        "c_gates": 0.3 * normal((1, 24)),
    }


INTEGERS = {
    "last": np.array([-1]),
    "axis1": np.array([1]),
    "axis0": np.array([0]),
    "index": np.array(0),
    "picks": np.array([0, 2]),
    "flat": np.array([-1, D]),
    "heads": np.array([0, 0, 4, D // 4]),
    "all_heads": np.array([0, 0, D]),
    "mixed": np.array([-1, D, 1, 1]),
    "half_width": np.array([D // 2]),
    "halves": np.array([D // 2, D // 2]),
    "start": np.array([1]),
    "stop": np.array([3]),
    "far": np.array([np.iinfo(np.int64).max]),
    "before_all": np.array([-np.iinfo(np.int64).max]),
    "pair": np.array([2]),
    "pairs": np.array([-1, 2]),
    "second": np.array(1),
    "row_length": np.array(D),
    "places": np.arange(D),
    "places_turned": np.arange(D)[::-1].copy(),
    "channel_pads": np.array([0, 0, 0, 0, 0, D]),
    "no_pads": np.array([0, 1, 0, 0, 0, 0]),
}


def model(
    body: str,
    *,
    kind: str = "float",
    opset: int = 18,
    outputs: str = "y",
    inputs: str = "x[b,s,D]",
    extra: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Build a toy model.

    Args:
        body: Nodes in ONNX text. TYPE stands for the number of the element type.
        kind: Element type of inputs, outputs and weights.
        opset: Version of the default domain.
        outputs: Names of the outputs, separated by commas.
        inputs: Names and shapes of the inputs, separated by blanks; "ids" is int64.
        extra: Further constants, in their own types.
    """
    declared = []
    for one in inputs.split():
        name, shape = one[:-1].split("[")
        shape = shape.replace("D", str(D))
        element = {"ids": "int64", "mask": "bool"}.get(name, kind)
        declared.append(f"{element}[{shape}] {name}")
    returned = ", ".join(f"{kind} {name.strip()}" for name in outputs.split(","))
    nodes = body.replace("TYPE", str(ONNX_TYPES[kind]))
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
        f"toy ({', '.join(declared)}) => ({returned}) {{\n{nodes}\n}}"
    )
    proto = onnx.parser.parse_model(text)
    constants = {name: array.astype(TYPES[kind]) for name, array in weights().items()}
    constants |= INTEGERS | dict(extra or {})
    for name, array in constants.items():
        if re.search(rf"\b{name}\b", body):
            proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return proto


def feeds(proto: onnx.ModelProto, seed: int = 1, length: int = 5) -> dict[str, np.ndarray]:
    """Seeded inputs: two rows of `length` tokens."""
    rng = np.random.default_rng(seed)
    found = {}
    for value in proto.graph.input:
        dims = [
            d.dim_value or (2 if i == 0 else length)
            for i, d in enumerate(value.type.tensor_type.shape.dim)
        ]
        if value.name == "ids":
            found[value.name] = rng.integers(0, V, dims)
        elif value.name == "mask":
            found[value.name] = rng.integers(0, 2, dims).astype(bool)
        else:
            kind = ir.DataType(value.type.tensor_type.elem_type).numpy()
            found[value.name] = (3 * rng.standard_normal(dims)).astype(kind)
    return found


# Operators for which the runtime has no float64 kernel.
_NARROW = {"Conv", "ConvTranspose", "Erf", "GRU", "GlobalAveragePool", "LSTM", "Resize"}


def run_exactly(proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a float64 model without the runtime's fusions, which keep epsilon in float32."""
    if _NARROW & {node.op_type for node in proto.graph.node}:
        return list(onnx.reference.ReferenceEvaluator(proto).run(None, dict(inputs)))
    return run(proto, inputs, optimise=False)


def run(
    proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray], *, optimise: bool = True
) -> list[np.ndarray]:
    """Run in ONNX Runtime, fully optimised unless asked otherwise."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(inputs)))


def error(result: np.ndarray, reference: np.ndarray) -> float:
    """Relative error in the Frobenius norm."""
    reference = reference.astype(np.float64)
    return float(np.linalg.norm(result.astype(np.float64) - reference) / np.linalg.norm(reference))
