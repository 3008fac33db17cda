"""The operators in plain ONNX.

For a step of few tokens the weights of the value side are applied after the sum over the cache,
`(softmax(.) @ latent) @ value_weight`, so that the cache is read and never expanded; for a prompt
K and V are made once. All arithmetic between cache and output is in float32 where the type is
narrower: the error of a rounded cache is what the caller accepted, and nothing may add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.operators.signature import DOMAIN, INPUTS, OUTPUTS, Form

__all__ = ["operator_function", "rotate"]

_HALF = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


def operator_function(op_type: str, form: Form) -> ir.Function:
    """Write an operator as a model-local function.

    Args:
        op_type: A key of `INPUTS`.
        form: What its nodes have in common.
    """
    write = {
        "SlimAttention": _slim,
        "SlimHiddenAttention": _slim_hidden,
        "SlimCrossAttention": _slim_cross,
    }[op_type]
    body = _Body(form, INPUTS[op_type])
    results = write(body)
    for name, value in zip(OUTPUTS[op_type], results, strict=False):
        value.name = name
    graph = ir.Graph(
        list(body.values.values()), results, nodes=body.nodes, opset_imports={"": form.opset}
    )
    normed = bool(form.norm)
    floats = ["scale", *["softcap"] * form.softcap, *["key_epsilon"] * normed]
    # These are in the nodes for the sake of native kernels, which have no form to look at.
    ints = ["interleaved", "safe", *["key_norm", "key_centered"] * normed]
    attributes = [ir.Attr(name, ir.AttributeType.FLOAT, None) for name in floats]
    attributes += [ir.Attr(name, ir.AttributeType.INT, None) for name in ints]
    return ir.Function(DOMAIN, op_type, graph=graph, attributes=attributes)


class _Body:
    """A function under construction."""

    def __init__(self, form: Form, inputs: Sequence[str]) -> None:
        self.form = form
        self.values = {name: ir.Value(name=name) for name in inputs}
        self.nodes: list[ir.Node] = []
        self.build = self._builder(self.nodes)
        self._count = 0

    @property
    def wide(self) -> ir.DataType:
        """The type of all arithmetic."""
        return ir.DataType.FLOAT if self.form.dtype in _HALF else self.form.dtype

    def has(self, name: str) -> bool:
        return name in self.form.inputs

    def widened(self, name: str) -> ir.Value:
        """An input in the wide type."""
        return self.cast(self.values[name], self.form.dtype, self.wide)

    def cast(self, value: ir.Value, given: ir.DataType, wanted: ir.DataType) -> ir.Value:
        return value if given == wanted else self.build.Cast(value, to=wanted)

    def attribute(self, name: str) -> ir.Value:
        """A float attribute as a scalar of the wide type."""
        reference = ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)
        value = self.build.node("", "Constant", [], [reference], 1)[0]
        return self.cast(value, ir.DataType.FLOAT, self.wide)

    def dims(self, value: ir.Value, start: int, stop: int) -> ir.Value:
        """Part of the shape of a value."""
        return self.build.Slice(self.build.Shape(value), [start], [stop])

    def reshape(self, value: ir.Value, *parts: ir.Value | int) -> ir.Value:
        """Reshape to dimensions given as numbers and as parts of shapes."""
        build = self.build
        return build.Reshape(
            value, build.Concat(*([p] if isinstance(p, int) else p for p in parts), axis=0)
        )

    def append(self, past: str, new: str, axis: int) -> tuple[ir.Value, ir.Value]:
        """A state with the new tokens behind the old: as it is cached, and in the wide type."""
        form = self.form
        value = self.cast(self.values[new], form.dtype, form.cache)
        present = self.build.Concat(self.values[past], value, axis=axis)
        return present, self.cast(present, form.cache, self.wide)

    def either(
        self, condition: ir.Value, then: Callable[[], ir.Value], otherwise: Callable[[], ir.Value]
    ) -> ir.Value:
        """The result of one of two expressions."""
        outer = self.build
        graphs: list[ir.Graph] = []
        for make in (then, otherwise):
            nodes: list[ir.Node] = []
            self.build = self._builder(nodes)
            result = make()
            graphs.append(ir.Graph([], [result], nodes=nodes, name=f"branch.{len(graphs)}"))
        self.build = outer
        return outer.If(condition, then_branch=graphs[0], else_branch=graphs[1])

    def _builder(self, nodes: list[ir.Node]) -> Builder:
        def name(op_type: str) -> str:
            self._count += 1
            return f"{op_type}.{self._count}"

        return Builder(nodes.append, name)


def _slim(body: _Body) -> list[ir.Value]:
    present, keys = body.append("past_key", "key", axis=2)
    presents = [present]
    residual = None
    if body.has("residual"):
        present, residual = body.append("past_residual", "residual", axis=1)
        presents.append(present)
    build, weight = body.build, body.widened("value_weight")
    positioned = build.Add(keys, body.widened("key_bias")) if body.has("key_bias") else keys
    if body.form.norm:
        positioned = _normalise(body, positioned)
    if body.has("cos"):
        positioned = _rotate(body, positioned)
    query = _grouped(body, _scaled_query(body), keys)
    scores = build.MatMul(query, build.Transpose(positioned, perm=[0, 1, 3, 2]))
    weights = _softmax(body, scores)

    def expanded() -> ir.Value:
        latent = body.reshape(body.build.Transpose(keys, perm=[0, 2, 1, 3]), 0, 0, -1)
        if residual is not None:
            latent = body.build.Concat(latent, residual, axis=2)
        values = body.build.MatMul(body.build.Unsqueeze(latent, [1]), weight)
        return body.build.MatMul(_grouped(body, weights, keys), values)

    def absorbed() -> ir.Value:
        rows = body.reshape(weights, 0, -1, body.dims(weights, 3, 4))  # [B, H T, S]
        sums = body.build.MatMul(body.build.Unsqueeze(rows, [1]), keys)  # [B, G, H T, K]
        latent = body.reshape(body.build.Transpose(sums, perm=[0, 2, 1, 3]), 0, 0, -1)
        if residual is not None:
            latent = body.build.Concat(latent, body.build.MatMul(rows, residual), axis=2)
        heads = body.reshape(latent, 0, body.dims(keys, 1, 2), -1, body.dims(latent, 2, 3))
        return body.build.MatMul(heads, weight)

    return [_output(body, body.either(_is_prompt(body), expanded, absorbed), weights), *presents]


def _slim_hidden(body: _Body) -> list[ir.Value]:
    present, hidden = body.append("past_hidden", "hidden", axis=1)
    return [_attend_hidden(body, hidden), present]


def _slim_cross(body: _Body) -> list[ir.Value]:
    hidden = body.cast(body.values["hidden"], body.form.cache, body.wide)
    return [_attend_hidden(body, hidden)]


def _attend_hidden(body: _Body, hidden: ir.Value) -> ir.Value:
    key_weight, value_weight = body.widened("key_weight"), body.widened("value_weight")
    query = _grouped(body, _scaled_query(body), key_weight, axis=0)
    columns = body.build.Unsqueeze(body.build.Transpose(hidden, perm=[0, 2, 1]), [1])
    rows = body.build.Unsqueeze(hidden, [1])  # [B, 1, S, D]
    prompt = _is_prompt(body)

    def expanded_scores() -> ir.Value:
        return body.build.MatMul(query, body.build.MatMul(key_weight, columns))

    def absorbed_scores() -> ir.Value:
        latent = body.build.MatMul(query, key_weight)  # [B, G, n T, D]
        flat = body.reshape(latent, 0, 1, -1, body.dims(latent, 3, 4))
        scores = body.build.MatMul(flat, columns)
        return body.reshape(scores, 0, body.dims(latent, 1, 2), -1, body.dims(scores, 3, 4))

    weights = _softmax(body, body.either(prompt, expanded_scores, absorbed_scores))

    def expanded() -> ir.Value:
        values = body.build.MatMul(rows, value_weight)
        return body.build.MatMul(_grouped(body, weights, value_weight, axis=0), values)

    def absorbed() -> ir.Value:
        flat = body.reshape(weights, 0, 1, -1, body.dims(weights, 3, 4))
        sums = body.build.MatMul(flat, rows)
        heads = body.reshape(sums, 0, body.dims(value_weight, 0, 1), -1, body.dims(sums, 3, 4))
        return body.build.MatMul(heads, value_weight)

    return _output(body, body.either(prompt, expanded, absorbed), weights)


def _scaled_query(body: _Body) -> ir.Value:
    """The query, scaled before the product as a safeguard of its range: [B, H, T, K]."""
    return body.build.Mul(body.widened("query"), body.attribute("scale"))


def _is_prompt(body: _Body) -> ir.Value:
    """Whether expanding the cache takes fewer operations than absorbing the weights: T >= K."""
    query = body.values["query"]
    return body.build.Squeeze(
        body.build.GreaterOrEqual(body.dims(query, 2, 3), body.dims(query, 3, 4)), [0]
    )


def _grouped(body: _Body, value: ir.Value, like: ir.Value, axis: int = 1) -> ir.Value:
    """[B, H, T, ...] as [B, G, H / G T, ...], where G is the length of an axis of another value."""
    return body.reshape(value, 0, body.dims(like, axis, axis + 1), -1, body.dims(value, 3, 4))


def _softmax(body: _Body, scores: ir.Value) -> ir.Value:
    """Attention weights [B, H, T, S] from scores [B, G, H / G T, S]."""
    build, form = body.build, body.form
    scores = body.reshape(scores, body.dims(body.values["query"], 0, 3), body.dims(scores, 3, 4))
    if form.softcap:
        cap = body.attribute("softcap")
        scores = build.Mul(build.Tanh(build.Div(scores, cap)), cap)
    if body.has("bias"):
        scores = build.Add(scores, body.widened("bias"))
    weights = build.Softmax(scores, axis=-1)
    if form.safe:
        zero = body.cast(build.Constant(value_float=0.0), ir.DataType.FLOAT, body.wide)
        weights = build.Where(build.IsNaN(weights), zero, weights)
    return weights


def _normalise(body: _Body, keys: ir.Value) -> ir.Value:
    """Normalise keys [B, G, S, K] over each head, or over all heads of a token; gain and shift."""
    build, axes = body.build, [3] if body.form.norm == "head" else [1, 3]
    lengths = build.Gather(build.Shape(keys), axes)
    count = build.Cast(build.ReduceProd(lengths, keepdims=0), to=body.wide)

    def mean(value: ir.Value) -> ir.Value:
        return build.Div(build.ReduceSum(value, axes, keepdims=1), count)

    if body.form.centered:
        keys = build.Sub(keys, mean(keys))
    size = build.Add(mean(build.Mul(keys, keys)), body.attribute("key_epsilon"))
    keys = build.Div(keys, build.Sqrt(size))
    if body.has("key_gain"):
        keys = build.Mul(keys, body.widened("key_gain"))
    return build.Add(keys, body.widened("key_shift")) if body.has("key_shift") else keys


def _rotate(body: _Body, keys: ir.Value) -> ir.Value:
    """Rotate the first R channels of every key head, [B, G, S, K]."""
    # One angle for all keys would be broadcast without a word, where a mask is too short.
    length = body.dims(keys, 2, 3)
    cos, sin = (
        body.reshape(body.widened(name), 0, length, body.dims(body.values[name], 2, 3))
        for name in ("cos", "sin")
    )
    return rotate(body.build, keys, cos, sin, interleaved=body.form.interleaved)


def rotate(
    build: Builder, heads: ir.Value, cos: ir.Value, sin: ir.Value, *, interleaved: bool
) -> ir.Value:
    """Rotate the first R channels of heads.

    Args:
        build: Makes the nodes.
        heads: [B, N, S, K].
        cos: [B or 1, S, R / 2], of the type of `heads`.
        sin: Likewise.
        interleaved: Whether neighbouring channels are rotated together, not those of two halves.
    """
    cos, sin = build.Unsqueeze(cos, [1]), build.Unsqueeze(sin, [1])
    half = build.Slice(build.Shape(cos), [3], [4])
    width = build.Add(half, half)
    rotated = build.Slice(heads, [0], width, [3])
    if interleaved:
        even, odd = (build.Slice(rotated, [n], width, [3], [2]) for n in (0, 1))
    else:
        even, odd = build.Slice(rotated, [0], half, [3]), build.Slice(rotated, half, width, [3])
    first = build.Sub(build.Mul(even, cos), build.Mul(odd, sin))
    second = build.Add(build.Mul(odd, cos), build.Mul(even, sin))
    if interleaved:
        pairs = build.Concat(build.Unsqueeze(first, [4]), build.Unsqueeze(second, [4]), axis=4)
        rotated = build.Reshape(pairs, [0, 0, 0, -1])
    else:
        rotated = build.Concat(first, second, axis=3)
    return build.Concat(rotated, build.Slice(heads, width, [2**62], [3]), axis=3)


def _output(body: _Body, context: ir.Value, weights: ir.Value) -> ir.Value:
    """Heads side by side, [B, T, H V], from [B, G, H / G T, V]."""
    build = body.build
    heads = body.reshape(context, body.dims(body.values["query"], 0, 3), body.dims(context, 3, 4))
    if body.has("value_bias"):
        bias = body.widened("value_bias")
        if body.form.safe:
            # The weights sum to one, or to zero where everything is masked.
            bias = build.Mul(bias, build.Sign(build.ReduceSum(weights, [-1], keepdims=1)))
        heads = build.Add(heads, bias)
    merged = build.Reshape(build.Transpose(heads, perm=[0, 2, 1, 3]), [0, 0, -1])
    return body.cast(merged, body.wide, body.form.dtype)
