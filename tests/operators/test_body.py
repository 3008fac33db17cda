"""The plain-ONNX bodies compute what the operators are defined to compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from onnx_tricks.operators.body import operator_function
from onnx_tricks.operators.signature import DOMAIN, INPUTS, OUTPUTS, VERSION, Form
from tests.operators.reference import slim_attention, slim_hidden

Array = np.ndarray[Any, np.dtype[Any]]
_SCALE, _SOFTCAP = 0.3, 5.0


def _run(
    op_type: str,
    feeds: dict[str, Array],
    *,
    opset: int = 18,
    dtype: ir.DataType = ir.DataType.FLOAT,
    cache: ir.DataType | None = None,
    **form: bool,
) -> list[Array]:
    """Run one node of an operator, by its function."""
    cache = cache or dtype
    kinds = {name: cache if "past" in name else dtype for name in feeds}
    if op_type == "SlimCrossAttention":
        kinds["hidden"] = cache
    values = {
        name: ir.Value(name=name, type=ir.TensorType(kinds[name]), shape=ir.Shape([None] * a.ndim))
        for name, a in feeds.items()
    }
    names = OUTPUTS[op_type][: 1 if op_type == "SlimCrossAttention" else 2]
    if "residual" in feeds:
        names = OUTPUTS[op_type]
    attributes = [ir.AttrFloat32("scale", _SCALE)]
    if form.get("softcap"):
        attributes.append(ir.AttrFloat32("softcap", _SOFTCAP))
    node = ir.Node(
        DOMAIN,
        op_type,
        [values.get(n) for n in INPUTS[op_type]],
        attributes,
        num_outputs=len(names),
    )
    for output, name in zip(node.outputs, names, strict=True):
        output.name, output.type = name, ir.TensorType(cache if "present" in name else dtype)
        output.shape = ir.Shape([None] * (4 if name == "present_key" else 3))
    function = operator_function(
        op_type, Form(opset=opset, dtype=dtype, cache=cache, inputs=frozenset(feeds), **form)
    )
    graph = ir.Graph(
        list(values.values()),
        node.outputs,
        nodes=[node],
        opset_imports={"": opset, DOMAIN: VERSION},
        name="one",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=8, functions=[function]))
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    raw = {name: array.astype(kinds[name].numpy()) for name, array in feeds.items()}
    for name, array in raw.items():
        bits = array.view(np.uint16) if kinds[name] == ir.DataType.BFLOAT16 else array
        value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(kinds[name]))
        binding.bind_ortvalue_input(name, value)
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    # The runtime has no NumPy type for bfloat16.
    return [v.numpy() for v in binding.get_outputs() if v.data_type() != "tensor(bfloat16)"]


def _keys(
    tokens: int = 1,
    past: int = 5,
    *,
    heads: int = 4,
    groups: int = 4,
    rank: int = 3,
    rotary: int = 6,
    bias: bool = True,
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
    if rotary:
        angles = random.uniform(0, 6, (batch, past + tokens, rotary // 2))
        feeds |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    unwanted = [*["residual", "past_residual"] * (not rank)]
    unwanted += ["key_bias", "value_bias", "bias"] * (not bias)
    return {name: array for name, array in feeds.items() if name not in unwanted}


def _states(
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


def _close(ours: Array, theirs: Array | None, eps: float = 1e-6) -> None:
    assert theirs is not None
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= eps * np.abs(theirs).max()


# A prompt is a step of at least as many tokens as a head is wide: 6.
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("groups", [4, 2])
def test_slim_attention_attends_to_cached_keys(tokens: int, past: int, groups: int) -> None:
    feeds = _keys(tokens, past, groups=groups)
    output, key, residual = _run("SlimAttention", feeds)
    expected = slim_attention(feeds, scale=_SCALE)
    _close(output, expected[0])
    _close(key, expected[1])
    _close(residual, expected[2])


@pytest.mark.parametrize(("rotary", "interleaved"), [(4, False), (4, True), (6, True), (0, False)])
def test_slim_attention_rotates_part_of_a_head_either_way(rotary: int, interleaved: bool) -> None:
    feeds = _keys(rotary=rotary)
    output, *_ = _run("SlimAttention", feeds, interleaved=interleaved)
    _close(output, slim_attention(feeds, interleaved=interleaved, scale=_SCALE)[0])


def test_slim_attention_does_without_residual_and_biases() -> None:
    feeds = _keys(rank=0, bias=False)
    output, key = _run("SlimAttention", feeds)
    expected = slim_attention(feeds, scale=_SCALE)
    _close(output, expected[0])
    _close(key, expected[1])


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("groups", [4, 1])
def test_slim_hidden_attention_attends_to_cached_inputs(tokens: int, groups: int) -> None:
    feeds = _states(tokens, groups=groups)
    output, hidden = _run("SlimHiddenAttention", feeds, opset=13, softcap=True)
    expected = slim_hidden(feeds, scale=_SCALE, softcap=_SOFTCAP)
    _close(output, expected[0])
    _close(hidden, expected[1])


@pytest.mark.parametrize("tokens", [1, 7])
def test_slim_cross_attention_attends_to_an_encoder(tokens: int) -> None:
    feeds = _states(tokens, None)
    (output,) = _run("SlimCrossAttention", feeds, opset=23)
    _close(output, slim_hidden(feeds, scale=_SCALE)[0])


@pytest.mark.parametrize("cache", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_narrow_cache_costs_its_rounding_and_no_more(cache: ir.DataType, tokens: int) -> None:
    feeds = _keys(tokens)
    narrow = cache.numpy()
    rounded = {
        name: array.astype(narrow).astype(np.float64)
        if name in ("key", "past_key", "residual", "past_residual")
        else array
        for name, array in feeds.items()
    }
    output, *_ = _run("SlimAttention", feeds, cache=cache)
    _close(output, slim_attention(rounded, scale=_SCALE)[0])


def test_half_precision_accumulates_in_single_precision() -> None:
    feeds = {name: array.astype(np.float16) for name, array in _keys().items()}
    output, *_ = _run("SlimAttention", feeds, dtype=ir.DataType.FLOAT16)
    exact = {name: array.astype(np.float64) for name, array in feeds.items()}
    expected, *_ = slim_attention(exact, scale=_SCALE)
    assert np.abs(output - expected).max() <= 2**-11 * np.abs(expected).max()


def test_large_keys_in_half_precision_do_not_overflow() -> None:
    feeds = {name: array.astype(np.float16) for name, array in _keys(bias=False).items()}
    feeds["query"] *= np.float16(300)
    feeds["past_key"] *= np.float16(300)
    output, *_ = _run("SlimAttention", feeds, dtype=ir.DataType.FLOAT16)
    assert np.isfinite(output).all()


def test_a_row_in_which_everything_is_masked_gives_zeros_where_the_original_did() -> None:
    feeds = _keys(7)
    feeds["bias"][1, :, 2] = -np.inf
    output, *_ = _run("SlimAttention", feeds, safe=True)
    expected, *_ = slim_attention(feeds, scale=_SCALE)
    expected[1, 2] = 0
    _close(output, expected)
