"""Channels through reshapes and transpositions, held against arrays in which each is labelled."""

from __future__ import annotations

import random

import numpy as np
import onnx_ir as ir
import pytest

from onnx_tricks.graph.shapes import annotate
from onnx_tricks.patterns.channels import Channels, Obstacle
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.maker import came_from
from onnx_tricks.patterns.moves import follow
from tests import toys

BATCH, ROWS = 2, 6


def chain(seed: int) -> tuple[str, dict[str, np.ndarray], list[np.ndarray]]:
    """A seeded chain of nodes, its constants, and the channel of every number after each node."""
    rng = random.Random(seed)
    labels = np.broadcast_to(np.arange(toys.D), (BATCH, ROWS, toys.D))
    body, constants, found, name = "", {}, [], "x"
    for step in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            perm = rng.sample(range(labels.ndim), labels.ndim)
            labels = labels.transpose(perm)
            body += f"t{step} = Transpose<perm={perm}>({name}) "
        else:
            target = _factors(rng, labels.size)
            labels = labels.reshape(target)
            if rng.random() < 0.5:
                target[rng.randrange(len(target))] = -1
            constants[f"s{step}"] = np.array(target)
            body += f"t{step} = Reshape({name}, s{step}) "
        name = f"t{step}"
        found.append(labels)
    return body + f"y = Identity({name})", constants, found


def _factors(rng: random.Random, size: int) -> list[int]:
    """Up to five lengths with the given product."""
    lengths = [1] * rng.randint(1, 5)
    for prime in (2, 3):
        while size % prime == 0:
            size //= prime
            lengths[rng.randrange(len(lengths))] *= prime
    return lengths


def holds(channels: Channels, labels: np.ndarray) -> bool:
    """Whether channels lie where they are said to."""
    lines = np.moveaxis(labels, channels.axis, -1).reshape(-1, labels.shape[channels.axis])
    places = np.arange(lines.shape[-1])
    if channels.inner is not None:
        inner = channels.inner.factor * (BATCH if channels.inner.symbols else 1)
        assert len(channels.inner.symbols) <= 1
        return bool(np.all(lines == channels.order[places // inner % channels.width]))
    if channels.assumed and places.size != channels.width:
        return True  # no layer with a weight for so many channels can read it
    if channels.heads:
        first = lines[:, :1]
        return bool(np.all(lines - first == places) and np.all(first % places.size == 0))
    return bool(places.size == channels.width and np.all(lines == channels.order))


@pytest.mark.parametrize("inputs", [f"x[{BATCH},{ROWS},D]", f"x[b,{ROWS},D]"])
def test_channels_are_followed_to_where_they_are(inputs: str) -> None:
    followed = 0
    for seed in range(400):
        body, constants, labels = chain(seed)
        given = ir.from_proto(toys.model(body, inputs=inputs, extra=constants))
        annotate(given)
        extents = Extents()
        channels = Channels.all(-1, toys.D)
        value = given.graph.inputs[0]
        for expected in labels:
            if channels.inner is None and not channels.assumed:
                extents.learn(value, channels.axis, channels.width)
            (node,) = value.consumers()
            moved = follow(node, 0, channels, extents)
            if isinstance(moved, Obstacle):
                break
            ((value, channels),) = moved or ()
            assert holds(channels, expected), (seed, body, constants, channels)
            followed += 1
    assert followed > 400


def test_a_transposition_has_the_axes_that_it_names_and_no_more() -> None:
    # What comes from another domain has no rank that could be told.
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["": 17, "elsewhere": 1]>
        g (float[b, 8, t] x) => (float[b, t, 8] y) {
            h = elsewhere.Filter(x)
            y = Transpose<perm = [0, 2, 1]>(h)
        }
        """
    )
    assert came_from(model.graph.outputs[0], -1, 8, Extents()) == (0, -2)
