"""Models of one node of an operator, and inputs for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from onnx_tricks.operators.body import operator_function
from onnx_tricks.operators.signature import DOMAIN, INPUTS, KEY_NORMS, OUTPUTS, VERSION, Form
from onnx_tricks.runtime.library import find_library, register
from onnx_tricks.runtime.sessions import read_value

Array = np.ndarray[Any, np.dtype[Any]]
SCALE, SOFTCAP, EPSILON = 0.3, 5.0, 0.25


def one_node(
    op_type: str,
    kinds: Mapping[str, ir.DataType],
    ranks: Mapping[str, int],
    *,
    opset: int = 18,
    dtype: ir.DataType = ir.DataType.FLOAT,
    cache: ir.DataType = ir.DataType.FLOAT,
    **form: Any,
) -> onnx.ModelProto:
    """A model of one node of an operator, with its function."""
    values = {
        name: ir.Value(name=name, type=ir.TensorType(kinds[name]), shape=ir.Shape([None] * rank))
        for name, rank in ranks.items()
    }
    names = OUTPUTS[op_type]
    if "residual" not in kinds:
        names = names[:2]
    attributes = [ir.AttrFloat32("scale", SCALE)]
    if form.get("softcap"):
        attributes.append(ir.AttrFloat32("softcap", SOFTCAP))
    attributes += [ir.AttrInt64(n, form.get(n, False)) for n in ("interleaved", "safe")]
    if form.get("norm"):
        attributes.append(ir.AttrInt64("key_norm", KEY_NORMS[form["norm"]]))
        attributes.append(ir.AttrInt64("key_centered", form.get("centered", False)))
        attributes.append(ir.AttrFloat32("key_epsilon", EPSILON))
    inputs = [values.get(n) for n in INPUTS[op_type]]
    node = ir.Node(DOMAIN, op_type, inputs, attributes, num_outputs=len(names))
    for output, name in zip(node.outputs, names, strict=True):
        output.name, output.type = name, ir.TensorType(cache if "present" in name else dtype)
        output.shape = ir.Shape([None] * (4 if name == "present_key" else 3))
    function = operator_function(
        op_type, Form(opset=opset, dtype=dtype, cache=cache, inputs=frozenset(kinds), **form)
    )
    graph = ir.Graph(
        list(values.values()),
        node.outputs,
        nodes=[node],
        opset_imports={"": opset, DOMAIN: VERSION},
        name="one",
    )
    return ir.to_proto(ir.Model(graph, ir_version=8, functions=[function]))


def run_node(
    op_type: str,
    feeds: dict[str, Array],
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
    cache: ir.DataType | None = None,
    in_place: bool = False,
    **form: Any,
) -> list[Array]:
    """Run one node of an operator: by its kernel where there is a library, or by its function.

    `in_place` binds the past states as the present ones.
    """
    cache = cache or dtype
    kinds = {name: cache if "past" in name else dtype for name in feeds}
    if op_type == "SlimCrossAttention":
        kinds["hidden"] = cache
    ranks = {name: array.ndim for name, array in feeds.items()}
    model = one_node(op_type, kinds, ranks, dtype=dtype, cache=cache, **form)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if find_library() is not None:
        register(options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    # The runtime reads some arrays where they lie.
    held = {name: array.astype(kinds[name].numpy()) for name, array in feeds.items()}
    values = {name: ort_value(array) for name, array in held.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        past = output.name.replace("present", "past")
        if in_place and past in values:
            binding.bind_ortvalue_output(output.name, values[past])
        else:
            binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    return [read_value(value).copy() for value in binding.get_outputs()]


def ort_value(array: Array) -> Any:
    """An array as the runtime takes it, which has no NumPy type for bfloat16."""
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(np.uint16), int(ir.DataType.BFLOAT16)
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def key_feeds(
    tokens: int = 1,
    past: int = 5,
    *,
    heads: int = 4,
    groups: int = 4,
    rank: int = 3,
    rotary: int = 6,
    bias: bool = True,
    norm: bool = False,
) -> dict[str, Array]:
    random = np.random.default_rng((tokens, past, heads, groups, rank, rotary))
    batch, width, out = 2, 6, 5
    shapes = {
        "query": (batch, heads, tokens, width),
        "key": (batch, groups, tokens, width),
        "past_key": (batch, groups, past, width),
        "value_weight": (groups, groups * width + rank, out),
        "residual": (batch, tokens, rank),
        "past_residual": (batch, past, rank),
        "key_bias": (groups, 1, width),
        "value_bias": (heads, 1, out),
        "bias": (batch, 1, tokens, past + tokens),
    }
    feeds = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    if norm:
        feeds["key_gain"], feeds["key_shift"] = random.standard_normal((2, groups, 1, width))
    if rotary:
        angles = random.uniform(0, 6, (batch, past + tokens, rotary // 2))
        feeds |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    unwanted = [*["residual", "past_residual"] * (not rank)]
    unwanted += ["key_bias", "value_bias", "bias"] * (not bias)
    return {name: array for name, array in feeds.items() if name not in unwanted}


def hidden_feeds(
    tokens: int = 1, past: int | None = 5, *, heads: int = 4, groups: int = 4
) -> dict[str, Array]:
    random = np.random.default_rng((tokens, past or 0, heads, groups))
    batch, width, out, hidden = 2, 6, 5, 8
    new = 9 if past is None else tokens
    shapes = {
        "query": (batch, heads, tokens, width),
        "hidden": (batch, new, hidden),
        "past_hidden": (batch, past or 0, hidden),
        "key_weight": (groups, width, hidden),
        "value_weight": (groups, hidden, out),
        "bias": (1, heads, tokens, new + (past or 0)),
        "value_bias": (heads, 1, out),
    }
    feeds = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    return feeds if past is not None else {n: a for n, a in feeds.items() if n != "past_hidden"}
