"""What each layer is to cache: the cheapest that meets the tolerance in the cache's type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.graph.spill import spill
from onnx_tricks.inverse import condition
from onnx_tricks.latent import UnrecoverableError, value_spectrum
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.head_norm import HeadNorm
from onnx_tricks.rewrite import Skip
from onnx_tricks.rounding import round_jointly
from onnx_tricks.slim.encoder import find_encoded
from onnx_tricks.slim.layers import Layer
from onnx_tricks.slim.obstacles import changes_keys, obstacle, too_narrow
from onnx_tricks.slim.queries import has_own_product, query_weights

__all__ = ["LayerPlan", "Mode", "Options", "needs_inputs", "plan_layer"]

Mode = Literal["auto", "k", "x", "off"]
_Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller decides.

    Attributes:
        mode: Which caches may be used.
        tolerance: The error that rounding the cache may bring to the values, as a multiple of the
            error of rounding the values themselves.
        rank: Numbers of residual beside each key, whatever the error; None to choose.
        cache: Type of the cached states; None for that in which a layer computes.
        encoder: Type in which an encoder's states enter; None for that in which they do.
    """

    mode: Mode
    tolerance: float
    rank: int | None
    cache: ir.DataType | None
    encoder: ir.DataType | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class LayerPlan:
    """How one layer is rewritten.

    Attributes:
        layer: The layer.
        operator: The operator that takes its place.
        dtype: Type of the layer's activations.
        cache: Type of its states.
        before: Numbers cached per token by the original.
        after: Numbers cached per token by the result.
        weights: By the names of the operator's inputs. Where keys are cached, the weights that
            make them and the residual are `projection` [D, E + r], and `center` [D] is taken off
            the layer's input before.
        rank: Number of residual values beside each key.
        condition: Condition number of the key projection; None where it is not inverted.
        predicted_error: Of the values, relative to their size, for the rounding of the cache; None
            where nothing is rebuilt.
        measured_error: The same, on the inputs that were given.
    """

    layer: Layer
    operator: str
    dtype: ir.DataType
    cache: ir.DataType
    before: int
    after: int
    weights: Mapping[str, ir.TensorProtocol]
    rank: int = 0
    condition: float | None = None
    predicted_error: float | None = None
    measured_error: float | None = None

    @property
    def read(self) -> ir.DataType:
        """The type in which the operator reads the states."""
        return _read_as(self.cache, self.dtype)

    def details(self) -> dict[str, Any]:
        """What a report says of the layer."""
        found: dict[str, Any] = {
            "node": self.layer.label,
            "operator": self.operator,
            "cache_values_before": self.before,
            "cache_values_after": self.after,
        }
        if self.condition is not None and self.predicted_error is not None:
            found |= {
                "condition": float(f"{self.condition:.3g}"),
                "rank": self.rank,
                "predicted_error": float(f"{self.predicted_error:.3g}"),
            }
        if self.measured_error is not None:
            found["measured_error"] = float(f"{self.measured_error:.3g}")
        return found


def plan_layer(
    layer: Layer, options: Options, inputs: _Array | None, mask: ir.Value | None = None
) -> LayerPlan | Skip:
    """Decide what a layer caches, or why it stays as it is.

    Args:
        layer: The layer.
        options: What the caller decides.
        inputs: Rows [N, D] of the layer's input, to learn their mean and sizes from; or None.
        mask: The model's attention mask, if it has one.
    """
    reason = obstacle(layer, mask)
    if reason:
        return Skip(layer.label, reason)
    plan = _cheapest(layer, options, inputs)
    if isinstance(plan, Skip) or not any(has_own_product(one) for one in layer.views):
        return plan
    queries = query_weights(layer.view).items()
    own = {name: spill(array.astype(plan.dtype.numpy())) for name, array in queries}
    return dataclasses.replace(plan, weights={**plan.weights, **own})


def _cheapest(layer: Layer, options: Options, inputs: _Array | None) -> LayerPlan | Skip:
    view = layer.view
    keys = view.keys.projection
    assert keys is not None
    # Queries may be wider, to be rotated. Behind a fused operator no type is inferred at all; a
    # layer computes in that of its weights.
    dtype = dtype_of(keys.source) or next(
        one.linear.weight.tensor.dtype
        for one in (keys, view.values.projection)
        if one and one.linear
    )
    before = view.keys.heads * (view.head_width + view.value_width)
    if view.cross:
        return _keep_input(layer, "SlimCrossAttention", dtype, options, before, 0)
    if not changes_keys(view) and options.mode != "k":
        if keys.width >= before:
            return Skip(layer.label, f"its input of {keys.width} numbers is no less than {before}")
        return _keep_input(layer, "SlimHiddenAttention", dtype, options, before, keys.width)
    if options.mode == "x":
        how = "rotated" if view.keys.rotary is not None else "normalised"
        return Skip(layer.label, f"its keys are {how}, so its input cannot take their place")
    return _keep_keys(layer, dtype, options, before, inputs)


def needs_inputs(layer: Layer, options: Options) -> bool:
    """Whether a plan can profit from rows of the layer's input."""
    view = layer.view
    known = view.keys.projection is not None and not view.cross
    return known and (changes_keys(view) or options.mode == "k") and options.mode != "x"


def _keep_input(
    layer: Layer, operator: str, dtype: ir.DataType, options: Options, before: int, after: int
) -> LayerPlan | Skip:
    """Cache the layer's input, or nothing beside the states of an encoder."""
    view = layer.view
    keys, values = view.keys.projection, view.values.projection
    assert keys is not None
    assert values is not None
    if view.scores.softcap is not None and keys.bias() is not None:
        return Skip(layer.label, "its capped scores depend on the bias of its keys")
    # The bias of a key that is not rotated adds the same to all scores of a query.
    bias = values.bias()
    bias = np.zeros(values.columns.size) if bias is None else bias
    matrices = keys.matrix(), values.matrix()
    cache = (options.encoder if view.cross else options.cache) or dtype
    encoded = find_encoded(keys.source) if view.cross else None
    if encoded is not None and not encoded.direct:
        if view.scores.softcap is not None:
            return Skip(layer.label, "its capped scores depend on how the encoder's states change")
        cache = dtype
        key_matrix, _ = encoded.behind(matrices[0], bias)
        value_matrix, bias = encoded.behind(matrices[1], bias)
        matrices = key_matrix, value_matrix
    arrays = {
        "key_weight": matrices[0].T.reshape(keys.heads, view.head_width, -1),
        "value_weight": _by_group(matrices[1], values.heads),
        "value_bias": _by_head(bias, view),
    }
    weights = {name: spill(array.astype(dtype.numpy())) for name, array in arrays.items()}
    return LayerPlan(layer, operator, dtype, cache, before, after, weights)


def _keep_keys(
    layer: Layer, dtype: ir.DataType, options: Options, before: int, inputs: _Array | None
) -> LayerPlan | Skip:
    """Cache the keys, and as many values of a residual as the tolerance asks for."""
    view = layer.view
    keys, values = view.keys.projection, view.values.projection
    assert keys is not None
    assert values is not None
    narrow = too_narrow(keys)
    if narrow:
        return Skip(layer.label, narrow)
    w_k = keys.matrix()
    try:
        spectrum = value_spectrum(
            w_k, values.matrix(), b_k=keys.bias(), b_v=values.bias(), inputs=inputs
        )
    except UnrecoverableError as error:
        return Skip(layer.label, str(error))
    rank = options.rank
    if rank is None:
        rank = spectrum.least_rank(options.tolerance, _multiple(values.columns.size))
    if rank is None or rank >= values.columns.size:
        return Skip(
            layer.label,
            "no residual smaller than the values themselves meets the tolerance of "
            f"{options.tolerance:g} (--slim-tolerance)",
        )
    basis, cache = spectrum.basis(rank), options.cache or dtype
    read = _read_as(cache, dtype)
    rebuilt = np.concatenate([basis.key_to_value, basis.residual_to_value])
    projection = np.concatenate([w_k, basis.residual_weight], axis=1)
    rounded = round_jointly(rebuilt, basis.moment, dtype.numpy())
    arrays = {
        "value_weight": _by_group(rounded, values.heads),
        "key_bias": basis.key_bias.reshape(keys.heads, 1, -1),
        "value_bias": _by_head(basis.value_bias, view),
        "projection": projection,
        "center": basis.center,
        **_norm_weights(view),
    }
    return LayerPlan(
        layer,
        "SlimAttention",
        dtype,
        cache,
        before,
        keys.columns.size + rank,
        {name: spill(array.astype(dtype.numpy())) for name, array in arrays.items()},
        rank,
        condition(w_k),
        basis.predicted_error(read.numpy()),
        None if inputs is None else _measure(inputs - basis.center, projection, rounded, read),
    )


def _read_as(cache: ir.DataType, dtype: ir.DataType) -> ir.DataType:
    """The type in which an operator that computes in one type reads states of another.

    Native kernels that compute in anything but float32 read their own type alone.
    """
    return cache if dtype == ir.DataType.FLOAT else dtype


def _norm_weights(view: Attention) -> dict[str, _Array]:
    norm = view.keys.norm
    if not isinstance(norm, HeadNorm):
        return {}
    gain = norm.gain[:, None]
    if not norm.turned:
        return {"key_gain": gain, "key_shift": norm.shift[:, None]}
    # Behind the rotation, what multiplies a key's channel may multiply the query's instead.
    return {"key_gain": np.ones_like(gain), "query_gain": gain[list(view.groups)]}


def _measure(rows: _Array, projection: _Array, rebuilt: _Array, cache: ir.DataType) -> float:
    """The error of values from a rounded cache, relative to their size."""
    latent = rows @ projection
    with np.errstate(over="ignore"):
        kept = latent.astype(cache.numpy()).astype(np.float64)
    values = latent @ rebuilt.astype(np.float64)
    return float(
        np.linalg.norm(kept @ rebuilt.astype(np.float64) - values) / np.linalg.norm(values)
    )


def _by_group(matrix: _Array, groups: int) -> _Array:
    """[N, G V] as [G, N, V]."""
    return matrix.reshape(len(matrix), groups, -1).transpose(1, 0, 2)


def _by_head(bias: _Array, view: Attention) -> _Array:
    """[G V] as [H, 1, V]."""
    groups = view.values.heads
    return np.repeat(bias.reshape(groups, 1, -1), view.heads // groups, axis=0)


def _multiple(width: int) -> int:
    """Ranks of which numbers suit kernels, where the layer is wide enough to care."""
    return 4 if width >= 128 else 1
