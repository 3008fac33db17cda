"""An attention block computed again in NumPy, from its view and the float64 weights alone.

ONNX Runtime gives what enters the block; every value that the view names on the way is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime

from onnx_tricks.graph.shapes import dtype_of, rank_of
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.head_norm import HeadNorm
from onnx_tricks.patterns.heads import Heads
from onnx_tricks.patterns.rotary import Rotary
from onnx_tricks.patterns.scores import Bias

BATCH, NEW, PAST, SOURCE = 2, 3, 4, 5
Values = Mapping[ir.Value, np.ndarray]


def errors(
    model: ir.Model, attentions: Iterable[Attention], batch: int = BATCH
) -> Iterator[tuple[str, float]]:
    """What was computed again, and its relative error; the model gets more outputs."""
    attentions = list(attentions)
    values = run(model, {value for one in attentions for value in needed(one)}, batch)
    for attention in attentions:
        yield from compare(attention, values)


def run(model: ir.Model, wanted: set[ir.Value], batch: int) -> dict[ir.Value, np.ndarray]:
    """Seeded inputs, and the values that ONNX Runtime computes from them."""
    given = feeds(model, batch)
    floating = next(
        (v.dtype for v in model.graph.initializers.values() if v.dtype in (10, 1)),
        ir.DataType.FLOAT,
    )
    known = {value: given[value.name] for value in model.graph.inputs}
    constants = {
        value: value.const_value.numpy() for value in wanted if value.const_value is not None
    }
    integers = {
        node.outputs[1] for node in model.graph if node.op_type == "EmbedLayerNormalization"
    }
    asked = [value for value in wanted if value not in known and value not in constants]
    for value in asked:
        kind = ir.DataType.INT32 if value in integers else floating
        value.type = ir.TensorType(value.dtype or dtype_of(value) or kind)
        value.shape = None
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results = session.run([value.name for value in asked], given)
    return {**known, **constants, **dict(zip(asked, results, strict=True))}


def feeds(model: ir.Model, batch: int) -> dict[str, np.ndarray]:
    """Rows of which the last is padded on the left, with a past where the model takes one."""
    # That operator takes padding on the right, as a length.
    padded = all(node.op_type != "GroupQueryAttention" for node in model.graph)
    rng = np.random.default_rng(0)
    found = {}
    for value in model.graph.inputs:
        name = value.name or ""
        shape = [_length(axis, one, batch) for axis, one in enumerate(value.shape or ())]
        if "mask" in name:
            found[name] = np.ones(shape, np.int64)
            found[name][-1, : 2 * padded] = 0
        elif name == "use_cache_branch":
            found[name] = np.ones(1, bool)
        elif value.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            high = {"position_ids": 20, "token_type_ids": 2}.get(name, 90)
            found[name] = rng.integers(0, high, shape).astype(value.dtype.numpy())
        else:
            found[name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return found


def _length(axis: int, length: int | ir.SymbolicDim, batch: int) -> int:
    if isinstance(length, int):
        return length
    name = str(length.value)
    if axis == 0:
        return batch
    if name == "kv_cache_dim":
        return 64
    if "+" in name or "total" in name:
        return PAST + NEW
    if "past" in name:
        return PAST
    if re.search("height|width", name):
        return 24
    return SOURCE if re.search("encoder|source", name) else NEW


def needed(attention: Attention) -> Iterator[ir.Value]:
    """The values that a view names."""
    yield attention.query.operand
    yield attention.context
    if attention.merged is not None:
        yield attention.merged
    for term in attention.scores.terms:
        yield from [term.value] if isinstance(term, Bias) else [term.condition, term.fill]
    if attention.scores.padding is not None:
        yield attention.scores.padding
    for heads in (attention.query, attention.keys, attention.values):
        yield heads.operand
        yield heads.state
        if heads.projection is not None:
            yield heads.projection.source
            yield heads.projection.output
        if heads.cache is not None:
            yield from (v for v in (heads.cache.past, heads.cache.present) if v is not None)
        if heads.rotary is not None:
            yield from (heads.rotary.cos, heads.rotary.sin)
            if heads.rotary.positions is not None:
                yield heads.rotary.positions


def compare(attention: Attention, values: Values) -> Iterator[tuple[str, float]]:
    """Compute one attention again, step by step."""
    states = {}
    for word in ("query", "keys", "values"):
        heads = getattr(attention, word)
        state = heads_again(heads, values)
        if state is None:
            state = arranged(values[heads.state], heads.state_axes, len(heads.state_order))
        elif not heads.inside or heads.cache is not None:
            theirs = arranged(values[heads.state], heads.state_axes, len(heads.state_order))
            yield f"{word}: state", error(state, theirs)
        if heads.rotary is not None and heads.rotated_last:
            state = rotated(heads.rotary, state, values)
        if not heads.inside:
            operand = arranged(values[heads.operand], heads.axes, len(heads.order))
            yield f"{word}: operand", error((heads.scale * state)[:, lines(heads)], operand)
        states[word] = heads.scale * state
    k, v = (
        states[word][
            :, [list(getattr(attention, word).state_order).index(g) for g in attention.groups]
        ]
        for word in ("keys", "values")
    )
    product = states["query"] @ np.swapaxes(k, -1, -2)
    scores = scores_again(attention, product, values)
    if attention.weights is None:  # ONNX Runtime's kernel calls rows of the least number masked
        scores = np.where(scores.max(-1, keepdims=True) < -1e38, -np.inf, scores)
    context = softmax(scores, attention.safe) @ v
    merged = np.swapaxes(context, 1, 2).reshape(*context.shape[0:3:2], -1)
    theirs = values[attention.context]
    if attention.context_axes != ("b", "s", "hk"):
        theirs = arranged(theirs, attention.context_axes, attention.heads)
        yield "context", error(context, theirs)
    if attention.merged is not None:
        theirs = values[attention.merged]
        yield "merged", error(merged.reshape(theirs.shape), theirs)


def heads_again(heads: Heads, values: Values) -> np.ndarray | None:
    """Heads from the source of their projection, [B, G, S, K]."""
    projection = heads.projection
    if projection is None:
        return None
    x = values[projection.source].astype(np.float64)
    rows = x @ projection.matrix()
    bias = projection.bias()
    rows = rows if bias is None else rows + bias
    count = projection.heads
    found = np.swapaxes(rows.reshape(*rows.shape[:-1], count, -1), 1, 2)
    turned = isinstance(heads.norm, HeadNorm) and heads.norm.turned
    if turned:
        assert heads.rotary is not None
        found = rotated(heads.rotary, found, values)
    if heads.norm is not None:
        assert isinstance(heads.norm, HeadNorm)
        found = normalised(heads.norm, found)
    found = found[:, heads.state_order]
    if heads.rotary is not None and not heads.rotated_last and not turned:
        found = rotated(heads.rotary, found, values)
    if heads.cache is not None and heads.cache.past is not None:
        past = arranged(values[heads.cache.past], heads.cache.axes, len(heads.state_order))
        found = np.concatenate([past.astype(np.float64), found], axis=2)
    return found


def lines(heads: Heads) -> list[int]:
    """By head of the operand the one of the state that it is."""
    known = list(heads.state_order)
    return [known.index(head) for head in heads.order]


def normalised(norm: HeadNorm, heads: np.ndarray) -> np.ndarray:
    """Heads [B, G, S, K], each normalised by itself or all of a token."""
    axes = (1, 3) if norm.whole else 3
    if norm.centered:
        heads = heads - heads.mean(axes, keepdims=True)
    root = np.sqrt((heads**2).mean(axes, keepdims=True) + norm.epsilon)
    return heads / root * norm.gain[:, None] + norm.shift[:, None]


def rotated(rotary: Rotary, heads: np.ndarray, values: Values) -> np.ndarray:
    """Heads [B, G, S, K] turned, by a formula of its own."""
    cos, sin = (values[one].astype(np.float64) for one in (rotary.cos, rotary.sin))
    half = rotary.width // 2
    tokens = heads.shape[2]
    if cos.ndim == 2 and rotary.inside is not None:
        positions = PAST + np.arange(tokens)
        cos, sin = cos[positions], sin[positions]
    elif cos.ndim == 2 and rotary.positions is not None and values[rotary.cos].shape[0] != tokens:
        positions = values[rotary.positions]
        cos, sin = cos[positions], sin[positions]
    # cos and sin of every pair, [B or 1, 1, S, R / 2]
    angles = []
    for one in (cos, sin):
        one = one.reshape(-1, tokens, one.shape[-1])
        if one.shape[-1] == rotary.width:
            one = one[..., ::2] if rotary.interleaved else one[..., :half]
        angles.append(one[:, None])
    cos, sin = angles
    stop = rotary.start + rotary.width
    part = heads[..., rotary.start : stop]
    if rotary.interleaved:
        first, second = part[..., ::2], part[..., 1::2]
    else:
        first, second = part[..., :half], part[..., half:]
    pair = [first * cos - second * sin, second * cos + first * sin]
    if rotary.interleaved:
        turned = np.stack(pair, axis=-1).reshape(part.shape)
    else:
        turned = np.concatenate(pair, axis=-1)
    return np.concatenate([heads[..., : rotary.start], turned, heads[..., stop:]], axis=-1)


def scores_again(attention: Attention, product: np.ndarray, values: Values) -> np.ndarray:
    scores = attention.scores
    found = scores.scale * product
    if scores.softcap is not None:
        found = scores.softcap * np.tanh(found / scores.softcap)
    for term in scores.terms:
        shape = found.shape
        folded = term.view is not None and rank_of(term.view.inputs[0]) == 3
        flat = found.reshape(-1, *shape[2:]) if folded else found
        if isinstance(term, Bias):
            value = values[term.value]
            if value.dtype == bool:  # of a fused operator: what may be seen
                value = np.where(value, 0, -np.inf)
            # As coarse as the model: a very large term swallows the scores.
            with np.errstate(over="ignore"):
                flat = (flat + term.scale * value.astype(np.float64)).astype(np.float32)
        else:
            condition = values[term.condition] == term.holds
            flat = np.where(condition, term.scale * values[term.fill].astype(np.float64), flat)
        found = flat.reshape(shape).astype(np.float64)
    past = product.shape[-1] - product.shape[-2]
    if scores.causal:
        later = np.triu(np.ones(product.shape[-2:], bool), past + 1)
        found = np.where(later, -np.inf, found)
    if scores.padding is not None:
        kept = values[scores.padding]
        if kept.ndim == 1:
            kept = np.arange(product.shape[-1]) < kept[:, None]
        found = np.where(kept.astype(bool)[:, None, None], found, -np.inf)
    return found if scores.floor is None else np.maximum(found, scores.floor)


def softmax(scores: np.ndarray, safe: bool) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        weights = powers / powers.sum(-1, keepdims=True)
    return np.nan_to_num(weights) if safe else weights


def arranged(array: np.ndarray, axes: tuple[str, ...], heads: int) -> np.ndarray:
    """A value with its axes as [B, G, S, K]."""
    shape, order = [], ""
    for length, letters in zip(array.shape, axes, strict=True):
        order += letters
        if len(letters) < 2:
            shape += [length] * len(letters)
        else:
            assert len(letters) == 2
            assert "h" in letters
            shape += [heads if letter == "h" else length // heads for letter in letters]
    array = array.reshape(shape)
    present = [letter for letter in "bhsk" if letter in order]
    array = np.transpose(array, [order.index(letter) for letter in present])
    missing = tuple(place for place, letter in enumerate("bhsk") if letter not in order)
    return np.expand_dims(array, missing)


def error(result: np.ndarray, reference: np.ndarray) -> float:
    """Relative error; 1 where shapes differ."""
    reference = reference.astype(np.float64)
    if result.shape != reference.shape:
        return 1.0
    both = np.isnan(result) & np.isnan(reference)
    difference = np.where(both, 0, result - reference)
    size = np.linalg.norm(np.where(both, 0, reference))
    return float(np.linalg.norm(difference) / size) if size else float(np.linalg.norm(difference))
