"""The algebra of slim attention, on random shapes and on trained weights."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnx_tricks import latent
from onnx_tricks.inverse import condition
from onnx_tricks.models import demo_path
from onnx_tricks.rounding import round_jointly

HALF_TYPES = [np.float16, ml_dtypes.bfloat16]


@dataclasses.dataclass(frozen=True)
class Block:
    """Projections of an attention block, and inputs to learn from and to measure on."""

    w_k: np.ndarray
    w_v: np.ndarray
    sample: np.ndarray
    inputs: np.ndarray

    def spectrum(self, **kwargs: np.ndarray) -> latent.ValueSpectrum:
        return latent.value_spectrum(self.w_k, self.w_v, **kwargs)

    def error(self, basis: latent.ValueBasis, dtype: type = np.float64) -> float:
        """Of values rebuilt from a cache of this type, relative to their size."""
        exact = self.inputs @ self.w_v
        centred = self.inputs - basis.center
        key, residual = (
            (centred @ w).astype(dtype).astype(np.float64)
            for w in (self.w_k, basis.residual_weight)
        )
        rebuilt = key @ basis.key_to_value + residual @ basis.residual_to_value + basis.value_bias
        return float(np.linalg.norm(rebuilt - exact) / np.linalg.norm(exact))

    def floor(self, dtype: type) -> float:
        """The error of values that are stored themselves."""
        exact = self.inputs @ self.w_v
        return float(np.linalg.norm(exact.astype(dtype).astype(float) - exact)) / float(
            np.linalg.norm(exact)
        )


@pytest.fixture(scope="module")
def trained() -> list[Block]:
    """The blocks of the demo model, their gains folded; the inputs are those of Python code."""
    model = onnx.load(demo_path() / "model.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    readers = [
        [nodes[f"/model/layers.{i}/self_attn/{p}_proj/MatMul"] for p in "kv"] for i in range(4)
    ]
    taps = [key.input[0] for key, _ in readers]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(tap) for tap in taps)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(tokens: np.ndarray) -> list[np.ndarray]:
        feeds = {
            i.name: np.zeros((1, 6, 0, 32), np.float32)
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        feeds["input_ids"] = tokens[None].astype(np.int64)
        feeds["attention_mask"] = np.ones((1, len(tokens)), np.int64)
        feeds["position_ids"] = np.arange(len(tokens))[None]
        names = {i.name for i in session.get_inputs()}
        return session.run(taps, {name: x for name, x in feeds.items() if name in names})

    text = np.frombuffer(inspect.getsource(textwrap).encode(), np.uint8)[2000:2512]
    random = np.random.default_rng(0).integers(0, 256, 512)
    blocks = []
    for i, (nodes_, seen, sample) in enumerate(zip(readers, run(text), run(random), strict=True)):
        gain = stored[f"model.layers.{i}.input_layernorm.weight"].astype(np.float64)
        w_k, w_v = (gain[:, None] * stored[node.input[1]] for node in nodes_)
        blocks.append(Block(w_k, w_v, *((x[0] / gain) for x in (sample, seen))))
    return blocks


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Key weights of any condition up to 1e7, as wide as the input or wider."""
    width, more, values = draw(st.integers(1, 12)), draw(st.integers(0, 5)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    left = np.linalg.qr(rng.standard_normal((width, width)))[0]
    right = np.linalg.qr(rng.standard_normal((width + more, width)))[0]
    spread = np.logspace(0, -draw(st.floats(0, 7)), width)
    offset = draw(st.sampled_from([0.0, 3.0])) * rng.standard_normal(width)
    sample, inputs = rng.standard_normal((2, 20, width)) + offset
    return Block((left * spread) @ right.T, rng.standard_normal((width, values)), sample, inputs)


@given(blocks(), st.data())
@settings(max_examples=150, deadline=None)
def test_values_are_exact_at_every_rank(block: Block, data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    b_k, b_v = (rng.standard_normal(w.shape[1]) for w in (block.w_k, block.w_v))
    inputs = data.draw(st.sampled_from([None, block.sample]))
    spectrum = block.spectrum(b_k=b_k, b_v=b_v, inputs=inputs)
    basis = spectrum.basis(data.draw(st.integers(0, block.w_v.shape[1])))
    centred = block.inputs - basis.center
    key, residual = centred @ block.w_k, centred @ basis.residual_weight
    rebuilt = key @ basis.key_to_value + residual @ basis.residual_to_value + basis.value_bias
    np.testing.assert_allclose(rebuilt, block.inputs @ block.w_v + b_v, atol=1e-6)
    np.testing.assert_allclose(key + basis.key_bias, block.inputs @ block.w_k + b_k, atol=1e-12)


@given(blocks(), st.data())
@settings(max_examples=100, deadline=None)
def test_no_other_directions_of_the_same_rank_amplify_less(
    block: Block, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, block.w_v.shape[1]))
    basis = block.spectrum().basis(rank)
    sizes = np.linalg.norm(block.w_k, axis=0)[:, None]
    seed = data.draw(st.integers(0, 2**32))
    other = np.random.default_rng(seed).standard_normal((block.w_v.shape[1], rank))
    other = np.linalg.qr(other)[0]
    rest = np.linalg.pinv(block.w_k, rcond=1e-12) @ (block.w_v - block.w_v @ other @ other.T)
    least = np.linalg.norm(sizes * basis.key_to_value)
    assert least <= np.linalg.norm(sizes * rest) * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_the_error_on_text_is_as_predicted(trained, dtype) -> None:
    for block in trained:
        for inputs, factor in ((block.inputs, 1.25), (block.sample, 2)):
            basis = block.spectrum(inputs=inputs).basis(8)
            assert block.error(basis) < 1e-12
            assert 1 / factor < block.error(basis, dtype) / basis.predicted_error(dtype) < factor


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_plain_inverse_is_useless_on_trained_weights(trained, dtype) -> None:
    block = trained[2]
    assert condition(block.w_k) > 1e6
    assert block.error(block.spectrum().basis(0), dtype) > 1e4 * block.floor(dtype)
    assert block.error(block.spectrum().basis(8), dtype) < 10 * block.floor(dtype)


def test_centring_lessens_the_error_of_trained_weights(trained) -> None:
    for block in trained:
        centred, plain = (block.spectrum(inputs=x).basis(8) for x in (block.sample, None))
        assert block.error(centred, np.float16) < 0.9 * block.error(plain, np.float16)


def test_the_demo_model_needs_few_numbers_per_token(trained) -> None:
    spectra = [block.spectrum(inputs=block.sample) for block in trained]
    assert [s.least_rank(10.0, multiple=8) for s in spectra] == [8, 8, 8, 8]


@given(blocks(), st.floats(0.5, 1e4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_the_least_rank_is_the_first_that_meets_the_tolerance(
    block: Block, tolerance: float, multiple: int
) -> None:
    spectrum = block.spectrum(inputs=block.sample)
    rank = spectrum.least_rank(tolerance, multiple)
    meets = spectrum.amplification <= tolerance
    if rank is None:
        assert not meets[::multiple].any()
    else:
        assert rank % multiple == 0
        assert meets[rank]
        assert not meets[:rank:multiple].any()
        assert spectrum.basis(rank).rank == rank


def test_keys_narrower_than_the_input_are_refused_with_their_dimensions() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(
        latent.UnrecoverableError, match=r"32 key channels .* input of 64"
    ) as caught:
        latent.value_spectrum(rng.standard_normal((64, 32)), rng.standard_normal((64, 32)))
    assert (caught.value.width, caught.value.keys, caught.value.rank) == (64, 32, 32)


def test_repeated_key_heads_are_noticed() -> None:
    rng = np.random.default_rng(0)
    w_k, w_v = (np.repeat(rng.standard_normal((48, 2, 8)), 3, 1).reshape(48, 48) for _ in "kv")
    with pytest.raises(latent.UnrecoverableError, match="only 16 of 48: repeated") as caught:
        latent.value_spectrum(w_k, w_v)
    assert caught.value.rank == 16
    assert condition(w_k) == np.inf


def test_what_dead_key_channels_cannot_tell_is_in_the_residual(trained) -> None:
    block = trained[0]
    w_k = block.w_k.copy()
    w_k[:, [3, 100]] = 0
    block = dataclasses.replace(block, w_k=w_k)
    spectrum = block.spectrum()
    assert np.isinf(spectrum.amplification[:2]).all()
    assert spectrum.least_rank(1e12) == 2
    with pytest.raises(ValueError, match="at least 2, at most 192"):
        spectrum.basis(1)
    assert block.error(spectrum.basis(2)) < 1e-9
    assert block.error(spectrum.basis(16), np.float16) < 20 * block.floor(np.float16)


def test_the_right_inverse_of_wide_keys_amplifies_less_than_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    w_k = rng.standard_normal((16, 32)) * np.logspace(0, -3, 32)
    w_v = rng.standard_normal((16, 16))
    found = latent.value_spectrum(w_k, w_v).basis(0).key_to_value
    plain = w_k.T @ np.linalg.solve(w_k @ w_k.T, w_v)
    np.testing.assert_allclose(w_k @ found, w_v, atol=1e-9)
    sizes = np.linalg.norm(w_k, axis=0)[:, None]
    assert np.linalg.norm(sizes * found) < 0.5 * np.linalg.norm(sizes * plain)


def test_a_centre_is_the_same_number_in_every_type() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4, 200)) * np.logspace(-9, 2, 200)
    w = np.eye(200)
    center = latent.value_spectrum(w, w, inputs=inputs).basis(0).center
    assert np.any(center)
    for dtype in (*HALF_TYPES, np.float32):
        np.testing.assert_array_equal(center.astype(dtype).astype(np.float64), center)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_joint_rounding_loses_less_than_half_of_rounding_to_the_nearest(trained, dtype) -> None:
    for block in trained:
        basis = block.spectrum(inputs=block.sample).basis(8)
        weight = np.concatenate([basis.key_to_value, basis.residual_to_value])
        cached = np.concatenate([block.w_k, basis.residual_weight], axis=1)
        cached = (block.inputs - basis.center) @ cached
        joint = round_jointly(weight, basis.moment, dtype)
        assert joint.dtype == dtype
        lost, nearest = (
            np.linalg.norm(cached @ (w.astype(np.float64) - weight))
            for w in (joint, weight.astype(dtype))
        )
        assert lost < 0.5 * nearest
