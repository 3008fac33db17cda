"""The demo model in NumPy, in any floating type, with a cache of keys and values or of a latent.

Every product is accumulated in float32, as tensor cores and ONNX Runtime with its inserted casts
do, and every result of an operator is rounded to the type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_tricks.latent import ValueBasis
from onnx_tricks.models import demo_path
from onnx_tricks.rounding import round_jointly

__all__ = ["PROMPT", "REFERENCE", "Arithmetic", "Llama", "forward"]

Array = np.ndarray[Any, Any]
PROMPT = 512
"""How many tokens are read at once, with values rebuilt per key; later ones come one by one."""
_HEADS, _EPSILON = 6, 1e-5


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a model is computed.

    Attributes:
        name: What tables call it.
        dtype: The type of weights, caches and results.
        wide: Whether the latent `p K` of a decoding step stays in float32 until it meets A.
        joint: Whether A is rounded jointly to `dtype`; else to the nearest.
        exact: Whether A is kept in float32.
    """

    name: str
    dtype: Any
    wide: bool = False
    joint: bool = False
    exact: bool = False

    def round(self, x: Array) -> Array:
        """Rounds to the type, in a container that NumPy multiplies fast."""
        x = x if x.dtype == self._container else x.astype(self._container)
        return x if self.dtype in (np.float32, np.float64) else x.astype(self.dtype).astype("f4")

    def product(self, a: Array, b: Array) -> Array:
        """A product accumulated in float32 (float64 for the reference) and rounded."""
        return self.round(a @ b)

    def reader(self, basis: ValueBasis) -> Array:
        """[A; B], which turns a cached row into a value, as it is stored."""
        weight = np.concatenate([basis.key_to_value, basis.residual_to_value])
        if self.exact:
            return weight.astype(self._container)
        if self.joint:
            weight = round_jointly(weight, basis.moment, self.dtype)
        return self.round(weight)

    @property
    def _container(self) -> Any:
        return np.float64 if self.dtype == np.float64 else np.float32


REFERENCE = Arithmetic("fp64", np.float64)


@dataclasses.dataclass(frozen=True)
class Llama:
    """The demo model, its gains folded into the weights or not.

    Attributes:
        embedding: [V, D].
        layers: For each layer by name the weights, [in, out], and the gains, [D].
        norm: [D], the last gain.
        head: [D, V].
    """

    embedding: Array
    layers: list[dict[str, Array]]
    norm: Array
    head: Array

    @classmethod
    def demo(cls) -> Llama:
        """Reads the embedded demo model."""
        graph = onnx.load(demo_path() / "model.onnx").graph
        stored = {i.name: numpy_helper.to_array(i).astype("f8") for i in graph.initializer}
        weights = {
            node.name: stored[name]
            for node in graph.node
            if node.op_type == "MatMul"
            for name in node.input
            if name in stored
        }
        layers = []
        for i in range(4):
            names = {
                **{key: f"self_attn/{key}_proj" for key in "qkvo"},
                **{key: f"mlp/{key}_proj" for key in ("gate", "up", "down")},
            }
            layer = {k: weights[f"/model/layers.{i}/{name}/MatMul"] for k, name in names.items()}
            for key, name in (("norm1", "input"), ("norm2", "post_attention")):
                layer[key] = stored[f"model.layers.{i}.{name}_layernorm.weight"]
            layers.append(layer)
        return cls(
            stored["model.embed_tokens.weight"],
            layers,
            stored["model.norm.weight"],
            weights["/lm_head/MatMul"],
        )

    def rounded(self, arithmetic: Arithmetic) -> Llama:
        """The model as it is stored in a type, in float64."""

        def stored(x: Array) -> Array:
            return arithmetic.round(x).astype("f8")

        layers = [{name: stored(w) for name, w in layer.items()} for layer in self.layers]
        return Llama(stored(self.embedding), layers, stored(self.norm), stored(self.head))

    def folded(self) -> Llama:
        """The model with gains of one."""
        layers = []
        for layer in self.layers:
            gains = {**dict.fromkeys("qkv", "norm1"), **dict.fromkeys(("gate", "up"), "norm2")}
            folded = {
                k: layer[gains[k]][:, None] * w if k in gains else w for k, w in layer.items()
            }
            one = np.ones_like(self.norm)
            layers.append({**folded, "norm1": one, "norm2": one})
        head = self.norm[:, None] * self.head
        return Llama(self.embedding, layers, np.ones_like(self.norm), head)


def forward(
    model: Llama,
    tokens: Array,
    padding: Array,
    arithmetic: Arithmetic,
    bases: list[ValueBasis] | None = None,
    inputs: list[Array] | None = None,
) -> Array:
    """The logits of a batch, as a prompt and steps with a cache compute them.

    Every row is computed by itself, so a step of decoding and a row of one long pass are the same.

    Args:
        model: What to compute, in float64; gains are folded already where there are bases.
        tokens: [N, T] int; the first `PROMPT` columns are the prompt.
        padding: [N], how many columns on the left are padding.
        arithmetic: In what to compute.
        bases: Caches keys and a residual for each layer, instead of keys and values.
        inputs: Is given the input of each attention block, [N * T, D].

    Returns:
        [N, T, V].
    """
    r, product = arithmetic.round, arithmetic.product
    length = tokens.shape[1]
    columns = np.arange(length)
    hidden = (columns[None, :] > columns[:, None]) | (columns < padding[:, None, None])
    mask = r(np.where(hidden, -6e4, 0.0))[:, None]
    positions = np.maximum(columns - padding[:, None], 0)
    width = model.embedding.shape[1] // _HEADS
    angles = positions[:, None, :, None] / 10000 ** (np.arange(0, width, 2) / width)
    cos, sin = (r(np.concatenate([f(angles)] * 2, axis=-1)) for f in (np.cos, np.sin))

    def normed(x: Array, gain: Array) -> Array:
        return r(r(x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + _EPSILON)) * r(gain))

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], _HEADS, -1).transpose(0, 2, 1, 3)

    def joined(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3).reshape(len(x), length, -1)

    def rotated(x: Array) -> Array:
        half = np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], axis=-1)
        return r(r(x * cos) + r(half * sin))

    x = r(model.embedding)[tokens]
    for i, layer in enumerate(model.layers):
        weight = {name: r(w) for name, w in layer.items()}
        n = normed(x, layer["norm1"])
        if inputs is not None:
            inputs.append(n.reshape(-1, n.shape[-1]))
        query, key = product(n, weight["q"]), None
        if bases is None:
            key = product(n, weight["k"])
        else:
            centred = r(n - r(bases[i].center))
            cached = product(centred, weight["k"])
            residual = product(centred, r(bases[i].residual_weight))
            key = r(cached + r(bases[i].key_bias))
        scores = product(rotated(heads(query)), rotated(heads(key)).swapaxes(-1, -2))
        scores = r(r(scores * r(np.array(width**-0.5))) + mask)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = r(p / p.sum(axis=-1, keepdims=True))
        if bases is None:
            mixed = joined(product(p, heads(product(n, weight["v"]))))
        else:
            latent = np.concatenate([cached, residual], axis=-1)
            reader, bias = arithmetic.reader(bases[i]), r(bases[i].value_bias)
            mixed = joined(
                np.concatenate(
                    [
                        product(p[:, :, :PROMPT], heads(product(latent, reader))),
                        _read(p[:, :, PROMPT:], latent, reader, arithmetic),
                    ],
                    axis=2,
                )
            )
            mixed = r(mixed + bias)
        x = r(x + product(mixed, weight["o"]))
        n = normed(x, layer["norm2"])
        gate, up = product(n, weight["gate"]), product(n, weight["up"])
        x = r(x + product(r(r(gate * r(1 / (1 + np.exp(-gate)))) * up), weight["down"]))
    return product(normed(x, model.norm), r(model.head))


def _read(p: Array, latent: Array, reader: Array, arithmetic: Arithmetic) -> Array:
    """What each head makes of the cache in a decoding step: `(p latent) reader_i`."""
    mixed = p @ latent[:, None]
    if not arithmetic.wide:
        mixed = arithmetic.round(mixed)
    return arithmetic.product(mixed, reader.reshape(len(reader), _HEADS, -1).transpose(1, 0, 2))
