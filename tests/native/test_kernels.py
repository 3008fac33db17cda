"""The native kernels against NumPy in float64: every mode, type, layout and level."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from tests.operators.nodes import EPSILON, SCALE, SOFTCAP, Array, key_feeds, run_node
from tests.operators.reference import slim_attention, slim_hidden

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
BRIEF, DOUBLE = ir.DataType.BFLOAT16, ir.DataType.DOUBLE
_TYPES = [(FLOAT, FLOAT), (FLOAT, HALF), (FLOAT, BRIEF), (HALF, HALF), (BRIEF, BRIEF)]
# Of the largest number of an output: its own rounding, and what float32 loses before it.
_ERRORS = {FLOAT: 3e-6, HALF: 1e-3, BRIEF: 8e-3, DOUBLE: 1e-7}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call with drawn sizes, and what it is to give."""

    op_type: str
    feeds: dict[str, Array]
    expected: tuple[Array | None, ...]
    form: dict[str, Any]


class Draw:
    """Draws calls; types are those of the operator, to which all inputs are rounded."""

    def __init__(self, seed: int, dtype: ir.DataType, cache: ir.DataType) -> None:
        self.random = np.random.default_rng(seed)
        self.dtype, self.cache = dtype, cache

    def pick(self, *values: int) -> int:
        return int(self.random.choice(values))

    def normal(self, *shape: int, cached: bool = False) -> Array:
        numbers = self.random.standard_normal(shape)
        kinds = [self.dtype, self.cache] if cached else [self.dtype]
        for kind in kinds:
            numbers = numbers.astype(kind.numpy()).astype(np.float64)
        return numbers

    def keys(self, norm: str = "") -> Case:
        batch, heads, groups, new, past = self._sizes()
        width, out = self.pick(6, 16, 32, 64), self.pick(5, 16, 32)
        rank, rotated = self.pick(0, 4, 16), self.pick(0, width // 4, width // 2)
        interleaved = bool(self.pick(0, 1))
        feeds = {
            "query": self.normal(batch, heads, new, width),
            "key": self.normal(batch, groups, new, width, cached=True),
            "past_key": self.normal(batch, groups, past, width, cached=True),
            "value_weight": self.normal(groups, groups * width + rank, out),
        }
        if rank:
            feeds["residual"] = self.normal(batch, new, rank, cached=True)
            feeds["past_residual"] = self.normal(batch, past, rank, cached=True)
        if rotated:
            feeds["cos"], feeds["sin"] = self.normal(2, self.pick(1, batch), past + new, rotated)
        form: dict[str, Any] = {"interleaved": interleaved}
        if norm:
            form |= {"norm": norm, "centered": bool(self.pick(0, 1))}
        for name in ("key_bias", *["key_gain", "key_shift"] * bool(norm)):
            if self.pick(0, 1):
                feeds[name] = self.normal(groups, 1, width)
        options = self._rest(feeds, batch, heads, new, past, out)
        expected = slim_attention(feeds, scale=SCALE, epsilon=EPSILON, **form, **options)
        form["softcap"] = bool(options)
        return Case("SlimAttention", feeds, expected, form)

    def hidden(self, op_type: str) -> Case:
        batch, heads, groups, new, past = self._sizes()
        if op_type == "SlimCrossAttention":
            past = past or 1
        width, out = self.pick(6, 16, 64), self.pick(5, 16, 64)
        hidden = self.pick(8, 48, 100, 384)
        own = past if op_type == "SlimCrossAttention" else new
        feeds = {
            "query": self.normal(batch, heads, new, width),
            "hidden": self.normal(batch, own, hidden, cached=True),
            "key_weight": self.normal(groups, width, hidden) / 8,
            "value_weight": self.normal(groups, hidden, out),
        }
        if op_type == "SlimHiddenAttention":
            feeds["past_hidden"] = self.normal(batch, past, hidden, cached=True)
        else:
            past -= new
        options = self._rest(feeds, batch, heads, new, past, out)
        return Case(
            op_type,
            feeds,
            slim_hidden(feeds, scale=SCALE, **options),
            {"softcap": bool(options)},
        )

    def _sizes(self) -> tuple[int, int, int, int, int]:
        groups = self.pick(1, 2, 6)
        heads = groups * self.pick(1, 1, 3)
        return self.pick(1, 2, 9), heads, groups, self.pick(1, 2, 40, 70), self.pick(0, 17, 300)

    def _rest(
        self, feeds: dict[str, Array], batch: int, heads: int, new: int, past: int, out: int
    ) -> dict[str, float]:
        if self.pick(0, 1):
            feeds["value_bias"] = self.normal(heads, 1, out)
        if self.pick(0, 1):
            shape = [self.pick(1, n) for n in (batch, heads, new)]
            bias = self.normal(*shape, past + new)
            if shape[2] == new and past >= 0:  # causal, as exporters mask or by minus infinity
                later = np.arange(past + new) > past + np.arange(new)[:, None]
                lowest = (
                    float(ml_dtypes.finfo(self.dtype.numpy()).min) if self.pick(0, 1) else -np.inf
                )
                bias = np.where(later, lowest, bias)
            feeds["bias"] = bias
        return {"softcap": SOFTCAP} if self.pick(0, 1) else {}


def _check(case: Case, dtype: ir.DataType, cache: ir.DataType, **binding: bool) -> None:
    found = run_node(case.op_type, case.feeds, dtype=dtype, cache=cache, **case.form, **binding)
    for ours, theirs, kind in zip(found, case.expected, (dtype, cache, cache), strict=False):
        assert theirs is not None
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= _ERRORS[kind] * np.abs(theirs).max()


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize(("dtype", "cache"), [*_TYPES, (DOUBLE, DOUBLE)], ids=str)
def test_every_level_computes_what_the_definition_says(
    level: str,
    dtype: ir.DataType,
    cache: ir.DataType,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == DOUBLE and level != "portable":
        pytest.skip("doubles have one kernel")
    monkeypatch.setenv("ONNX_TRICKS_LEVEL", level)
    for seed in range(5):
        draw = Draw(seed, dtype, cache)
        for case in (
            *(draw.keys(norm) for norm in ("", "head", "heads")),
            draw.hidden("SlimHiddenAttention"),
            draw.hidden("SlimCrossAttention"),
        ):
            _check(case, dtype, cache)


@pytest.mark.parametrize("norm", ["", "head", "heads"])
def test_new_rows_are_appended_in_place_where_past_and_present_are_one_buffer(
    norm: str, library: Path
) -> None:
    feeds = key_feeds(3, 5, norm=bool(norm))
    expected = slim_attention(feeds, norm=norm, epsilon=EPSILON, scale=SCALE)
    room = {"past_key": 2, "past_residual": 1}
    for name, axis in room.items():
        extra = [(0, 6 if i == axis else 0) for i in range(feeds[name].ndim)]
        feeds[name] = np.pad(feeds[name], extra, constant_values=np.nan)
    output, key, residual = run_node("SlimAttention", feeds, in_place=True, norm=norm)
    _near(output, expected[0])
    assert key.shape[2] == residual.shape[1] == 11
    _near(key[:, :, :8], expected[1])
    _near(residual[:, :8], expected[2])
    assert np.isnan(key[:, :, 8:]).all()
    with pytest.raises(Exception, match="one buffer of at least S = 8 bound as past and present"):
        run_node("SlimAttention", feeds, norm=norm)


def _near(ours: Array, theirs: Array | None) -> None:
    assert theirs is not None
    assert np.abs(ours - theirs).max() <= 3e-6 * np.abs(theirs).max()


def test_nothing_to_attend_to_gives_nothing(library: Path) -> None:
    feeds = key_feeds(1)
    for name in ("query", "key", "residual"):
        feeds[name] = feeds[name][:, :, :0] if feeds[name].ndim == 4 else feeds[name][:, :0]
    for name in ("cos", "sin"):
        feeds[name] = feeds[name][:, :5]
    feeds["bias"] = np.zeros((1, 1, 1, 5))
    output, key, _ = run_node("SlimAttention", feeds)
    assert output.shape == (2, 0, 20)
    _near(key, feeds["past_key"])


def test_long_contexts_are_divided_among_threads_and_put_together(library: Path) -> None:
    for cache in (FLOAT, HALF):
        draw = Draw(0, FLOAT, cache)
        feeds = {
            "query": draw.normal(1, 6, 1, 64) * 4,
            "hidden": draw.normal(1, 1500, 384, cached=True),
            "key_weight": draw.normal(6, 64, 384) / 8,
            "value_weight": draw.normal(6, 384, 64),
        }
        expected = slim_hidden(feeds, scale=SCALE)
        _check(Case("SlimCrossAttention", feeds, expected, {}), FLOAT, cache)
