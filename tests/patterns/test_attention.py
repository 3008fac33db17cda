"""Attention blocks of real exports and toy graphs: found, measured, and computed again in NumPy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.models import demo_path
from onnx_tricks.patterns.attention import find_attentions
from onnx_tricks.patterns.block import Attention, OpaqueAttention
from onnx_tricks.patterns.head_norm import HeadNorm
from tests import toys
from tests.conftest import Export, import_recipes
from tests.patterns import recompute

import_recipes()  # where the exporters are not, skip

from transformers import AutoConfig  # noqa: E402

OPTIMUM = [
    *"llama mistral qwen2 qwen3 gemma gemma_wide gemma2 gemma3 phi phi3 phi3_heads gpt2".split(),
    *"gpt_neox gptj codegen opt bloom falcon mpt olmo olmo_heads olmo2 cohere stablelm".split(),
    *"stablelm_heads granite qwen3_moe bert roberta distilbert albert vit t5 t5_wide bart".split(),
    *"marian pegasus m2m_100 whisper".split(),
]
DYNAMO = [
    ("llama", "dynamo18"),
    ("llama", "dynamo23"),
    ("llama", "dynamo18-cache"),
    ("gemma3", "dynamo23-cache"),
    ("gpt2", "dynamo23"),
    ("mixtral", "dynamo18"),
    ("bert", "dynamo18"),
    ("vit", "dynamo23"),
    ("bart", "dynamo23"),
    ("whisper", "dynamo18"),
]
# By family: channels turned, and whether neighbours are.
ROTARY = {
    "llama": (16, False),
    "phi": (16, False),
    "gpt_neox": (6, False),
    "gptj": (8, True),
    "codegen": (8, True),
    "cohere": (12, True),
    "stablelm": (6, False),
    "falcon": (12, False),
    "gemma3": (16, False),
}


def views(source: Path | onnx.ModelProto) -> tuple[ir.Model, list[Attention | OpaqueAttention]]:
    model = load_model(source).model if isinstance(source, Path) else ir.from_proto(source)
    annotate(model)
    return model, list(find_attentions(model))


def hold(source: Path | onnx.ModelProto, count: int, batch: int = 2) -> list[Attention]:
    """All blocks are understood, and their views compute what the graph does."""
    model, found = views(source)
    assert [one.reason for one in found if isinstance(one, OpaqueAttention)] == []
    assert len(found) == count
    blocks = [one for one in found if isinstance(one, Attention)]
    checked = list(recompute.errors(model, blocks, batch))
    assert len(checked) >= count
    assert {word: error for word, error in checked if not error < 2e-6} == {}
    return blocks


@pytest.mark.parametrize("name", OPTIMUM)
def test_every_block_of_a_family_is_computed_again(export: Export, name: str) -> None:
    folder = export(name, "optimum")
    config = AutoConfig.from_pretrained(folder)
    heads = config.num_attention_heads
    width = getattr(config, "d_kv", config.hidden_size // heads)
    width = getattr(config, "head_dim", None) or width
    shared = 1 if name == "falcon" else getattr(config, "num_key_value_heads", heads)
    for file in sorted(folder.glob("*model.onnx")):
        cross = file.stem.startswith("decoder")
        for block in hold(file, 4 if cross else 2):
            assert (block.heads, block.key_heads) == (heads, shared)
            assert (block.head_width, block.value_width) == (width, width)
            assert block.merged is not None
            assert block.projection is not None


@pytest.mark.parametrize(("name", "exporter"), DYNAMO)
def test_every_block_is_computed_again_as_dynamo_writes_it(
    export: Export, name: str, exporter: str
) -> None:
    # The exporter writes the angles of RotaryEmbedding for one row, and ONNX Runtime insists.
    batch = 1 if exporter.startswith("dynamo23") else 2
    for file in sorted(export(name, exporter).glob("*model.onnx")):
        hold(file, 4 if file.stem == "decoder_model" else 2, batch)


def test_the_demo_is_computed_again() -> None:
    for block in hold(demo_path() / "model.onnx", 4):
        assert (block.heads, block.key_heads, block.head_width) == (6, 6, 32)
        assert block.safe
        assert not block.cross
        keys = block.keys
        assert keys.cache is not None
        assert keys.rotary is not None
        assert not keys.rotated_last
        assert keys.state is keys.cache.present
        assert keys.scale * block.query.scale * block.scores.scale == pytest.approx(32**-0.5)


@pytest.mark.parametrize("name", ROTARY)
def test_the_channels_that_turn_are_told(export: Export, name: str) -> None:
    _, found = views(export(name, "optimum") / "model.onnx")
    for block in found:
        for heads in (block.query, block.keys):
            rotary = heads.rotary
            assert (rotary.start, rotary.width, rotary.interleaved) == (0, *ROTARY[name])
            assert rotary.positions is not None


def test_caches_of_keys_and_values_are_told(export: Export) -> None:
    model, found = views(export("gpt2", "optimum") / "model.onnx")
    names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for layer, block in enumerate(found):
        for heads, slot in ((block.keys, "key"), (block.values, "value")):
            assert heads.cache.past.name == f"past_key_values.{layer}.{slot}"
            assert heads.cache.output.name == f"present.{layer}.{slot}"
            assert {heads.cache.past.name, heads.cache.output.name} <= names
            assert heads.cache.axes == ("b", "h", "s", "k")


def test_packed_projections_are_told_apart(export: Export) -> None:
    _, found = views(export("bloom", "optimum") / "model.onnx")
    # BLOOM packs [heads, 3, width].
    expected = np.arange(4 * 3 * 12).reshape(4, 3, 12)
    for place, word in enumerate(("query", "keys", "values")):
        columns = getattr(found[0], word).projection.columns
        np.testing.assert_array_equal(columns, expected[:, place])


def test_the_branches_of_a_merged_decoder_are_those_of_the_two_decoders(export: Export) -> None:
    folder = export("t5", "optimum")

    def outline(name: str) -> list[tuple[object, ...]]:
        _, found = views(folder / f"{name}.onnx")
        return [
            (
                block.heads,
                block.cross,
                [
                    None if one is None else one.name
                    for heads in (block.keys, block.values)
                    for one in (heads.cache.past, heads.cache.output, heads.input)
                ],
            )
            for block in found
        ]

    merged = outline("decoder_model_merged")
    assert sorted(merged, key=str) == sorted(
        outline("decoder_model") + outline("decoder_with_past_model"), key=str
    )
    assert sum(cross for _, cross, _ in merged) == 4


def test_a_view_with_columns_of_other_heads_is_noticed(export: Export) -> None:
    """The comparison can fail."""
    model, (block, *_) = views(export("gpt2", "optimum") / "model.onnx")
    projection = dataclasses.replace(
        block.keys.projection, columns=block.keys.projection.columns[::-1]
    )
    keys = dataclasses.replace(block.keys, projection=projection)
    wrong = dataclasses.replace(block, keys=keys)
    found = dict(recompute.errors(model, [wrong]))
    assert found["keys: state"] > 0.5


def test_finding_changes_nothing(export: Export) -> None:
    for name in ("llama", "bloom"):
        model = load_model(export(name, "optimum") / "model.onnx").model
        before = ir.to_proto(model).SerializeToString()
        annotate(model)
        assert len(list(find_attentions(model))) == 2
        assert ir.to_proto(model).SerializeToString() == before


SPLIT = "q0, k0, v0 = Split<axis=2, num_outputs=3>(p) "
PROJECT = "p0 = MatMul(x, w_packed) p = Add(p0, c_packed) " + SPLIT
ARRANGE = (
    "q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1) "
    "k1 = Reshape(k0, heads) k = Transpose<perm=[0,2,3,1]>(k1) "
    "v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1) "
)
MERGE = "c1 = Transpose<perm=[0,2,1,3]>(ctx) c2 = Reshape(c1, flat3) y = MatMul(c2, w_square)"
WEIGH = "a = Softmax<axis=-1>(s) ctx = MatMul(a, v) "
EXTRA = {
    "flat3": np.array([0, 0, toys.D]),
    "cap": np.float32(2.0),
    "low": np.float32(-np.inf),
    "nothing": np.float32(0.0),
    "sink": np.zeros((2, 4, 5, 1), np.float32),
    "one_less": np.array([-1]),
    "begin": np.array([0]),
    "alibi": np.linspace(-1, 0, 20, dtype=np.float32).reshape(1, 4, 1, 5),
    "table": np.random.default_rng(5).standard_normal((32, 8)).astype(np.float32),
    "w_group": np.random.default_rng(6).standard_normal((16, 128)).astype(np.float32) / 4,
    "lengths": np.array([2], np.int32),
    "total": np.array(3, np.int32),
}

SPELLINGS = {
    "scaled scores": "s0 = MatMul(q, k) s = Mul(s0, half) ",
    "divided scores": "s0 = MatMul(q, k) s = Div(s0, two) ",
    "scaled keys and queries": "ks = Mul(k, half) qs = Mul(half, q) s = MatMul(qs, ks) ",
    "capped": "s0 = MatMul(q, k) s1 = Div(s0, cap) s2 = Tanh(s1) s = Mul(s2, cap) ",
    "capped with a scale in front": (
        "s0 = MatMul(q, k) s1 = Mul(s0, half) s2 = Div(s1, cap) s3 = Tanh(s2) s = Mul(s3, cap) "
    ),
    "a bias that is scaled": "s0 = MatMul(q, k) s1 = Add(alibi, s0) s = Mul(s1, half) ",
    "less a bias": "s0 = MatMul(q, k) s = Sub(s0, alibi) ",
    "less its maximum": (
        "s0 = MatMul(q, k) m = ReduceMax<keepdims=1>(s0, last) s1 = Sub(s0, m) s = Add(s1, alibi) "
    ),
    "masked": "s0 = MatMul(q, k) t = Less(alibi, minus_half) s = Where(t, low, s0) ",
    "kept": "s0 = MatMul(q, k) t = Less(alibi, minus_half) s = Where(t, s0, low) ",
    "clipped": "s0 = MatMul(q, k) s = Max(s0, minus_half) ",
    "einsum": 'kt = Transpose<perm=[0,1,3,2]>(k) s = Einsum<equation="bhqd,bhkd->bhqk">(q, kt) ',
    "fused": (
        "kt = Transpose<perm=[0,1,3,2]>(k) "
        "s = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(q, kt) "
    ),
}


def toy(body: str, inputs: str = "x[2,3,D]") -> onnx.ModelProto:
    body = body.replace("alibi", "alibi3") if "alibi" in body else body
    extra = {**EXTRA, "alibi3": EXTRA["alibi"][..., :3]}
    return toys.model(body, inputs=inputs, extra={k: np.asarray(v) for k, v in extra.items()})


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_scores_is_computed_again(spelling: str) -> None:
    hold(toy(PROJECT + ARRANGE + SPELLINGS[spelling] + WEIGH + MERGE), 1)


def test_the_axis_of_a_softmax_may_be_counted_from_the_front() -> None:
    # A bias that the dry run knows nothing of: where the last axis lies, shape inference tells.
    bias = "b0 = LpNormalization(alibi) s0 = MatMul(q, k) s = Add(s0, b0) "
    weigh = WEIGH.replace("axis=-1", "axis=3")
    hold(toy(PROJECT + ARRANGE + bias + weigh + MERGE), 1)


def test_a_softmax_over_rows_one_behind_the_other_is_computed_again() -> None:
    # As onnx.version_converter writes the softmax of opsets before 13.
    weigh = (
        "s0 = MatMul(q, k) s1 = Add(s0, alibi) s2 = Shape(s1) s = Flatten<axis=3>(s1) "
        "a0 = Softmax<axis=-1>(s) a = Reshape(a0, s2) ctx = MatMul(a, v) "
    )
    hold(toy(PROJECT + ARRANGE + weigh + MERGE), 1)


def test_a_softcap_is_told_apart_from_the_scale() -> None:
    (block,) = hold(
        toy(PROJECT + ARRANGE + SPELLINGS["capped with a scale in front"] + WEIGH + MERGE), 1
    )
    assert (block.scores.scale, block.scores.softcap) == (0.5, 2.0)


ALL_MASKED = (
    "t = Equal(s, low) u = Not(t) u1 = Cast<to=1>(u) u2 = ReduceMax<keepdims=1>(u1, last) "
    "u3 = Cast<to=9>(u2) n = Not(u3)"
)


@pytest.mark.parametrize("zeroes", ["n = IsNaN(a)", ALL_MASKED])
def test_rows_of_zeros_are_noticed(zeroes: str) -> None:
    body = (
        "s0 = MatMul(q, k) h = Less(alibi, half) s = Where(h, low, s0) a = Softmax<axis=-1>(s) "
        f"{zeroes} a2 = Where(n, nothing, a) ctx = MatMul(a2, v) "
    )
    (block,) = hold(toy(PROJECT + ARRANGE + body + MERGE), 1)
    assert block.safe


OPERATORS = {
    "MultiHeadAttention": (
        PROJECT + "y = com.microsoft.MultiHeadAttention<num_heads=4>(q0, k0, v0)",
        "x[2,3,D]",
    ),
    "MultiHeadAttention with a bias": (
        (
            f"p = MatMul(x, w_packed) {SPLIT} y = com.microsoft.MultiHeadAttention<num_heads=4, "
            "scale=0.3, unidirectional=1>(q0, k0, v0, c_packed)"
        ),
        "x[2,3,D]",
    ),
    "MultiHeadAttention with a past": (
        (
            PROJECT + "y, pk, pv = com.microsoft.MultiHeadAttention<num_heads=4>"
            "(q0, k0, v0, , , , past_k, past_v)"
        ),
        "x[2,3,D] past_k[b,4,past,4] past_v[b,4,past,4]",
    ),
    "com.microsoft Attention": (
        "y = com.microsoft.Attention<num_heads=4>(x, w_packed, c_packed)",
        "x[2,3,D]",
    ),
    "GroupQueryAttention, packed": (
        (
            "p = MatMul(x, w_group) y, pk, pv = com.microsoft.GroupQueryAttention<num_heads=4, "
            "kv_num_heads=2, do_rotary=1>(p, , , past_k, past_v, seven, total, table, table)"
        ),
        "x[1,3,D] past_k[b,2,past,16] past_v[b,2,past,16]",
    ),
    "Attention of opset 23": (
        PROJECT + "y = Attention<q_num_heads=4, kv_num_heads=4, is_causal=1>(q0, k0, v0)",
        "x[2,3,D]",
    ),
    "Attention of opset 23 with a past": (
        PROJECT + "k9 = Reshape(k0, heads) k8 = Transpose<perm=[0,2,1,3]>(k9) "
        "v9 = Reshape(v0, heads) v8 = Transpose<perm=[0,2,1,3]>(v9) "
        "q9 = Reshape(q0, heads) q8 = Transpose<perm=[0,2,1,3]>(q9) "
        "ctx, pk, pv = Attention(q8, k8, v8, , past_k, past_v) " + MERGE,
        "x[2,3,D] past_k[b,4,past,4] past_v[b,4,past,4]",
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_attention_operator_is_computed_again(name: str) -> None:
    body, inputs = OPERATORS[name]
    shown = [word for word in ("pk", "pv") if f"{word}," in body or f"{word} " in body]
    extra = {**EXTRA, "seven": np.array([6], np.int32), "total": np.array(7, np.int32)}
    proto = toys.model(
        body,
        inputs=inputs,
        outputs=", ".join(["y", *shown]),
        opset=23 if "23" in name else 18,
        extra={key: np.asarray(value) for key, value in extra.items()},
    )
    (block,) = hold(proto, 1, batch=1 if "Group" in name else 2)
    shared = "Group" in name
    assert (block.heads, block.key_heads) == (4, 2 if shared else 4)
    assert block.head_width == (16 if shared else 4)
    if shown:
        assert block.keys.cache.past.name == "past_k"
        assert block.values.cache.output.name == "pv"


def test_keys_that_are_rotated_after_reading_the_cache_are_told() -> None:
    body = (
        PROJECT + "q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1) "
        "v1 = Reshape(v0, heads) v2 = Transpose<perm=[0,2,1,3]>(v1) "
        "v = Concat<axis=2>(past_v, v2) k1 = Reshape(k0, heads) "
        "k2 = Transpose<perm=[0,2,1,3]>(k1) kc = Concat<axis=2>(past_k, k2) "
        "ka, kb = Split<axis=3, num_outputs=2>(kc) kn = Neg(kb) kr = Concat<axis=3>(kn, ka) "
        "n = Shape<start=2, end=3>(kc) n0 = Squeeze(n) r = Range(zero, n0, unit) "
        "r1 = Cast<to=1>(r) r2 = Unsqueeze(r1, last) an = Mul(r2, frequency) "
        "co = Cos(an) si = Sin(an) m1 = Mul(kc, co) m2 = Mul(kr, si) kt = Add(m1, m2) "
        "k = Transpose<perm=[0,1,3,2]>(kt) s = MatMul(q, k) " + WEIGH + MERGE
    )
    extra = EXTRA | {"zero": np.array(0), "unit": np.array(1)}
    extra["frequency"] = np.array([1, 0.3, 1, 0.3], np.float32)
    proto = toys.model(
        body,
        inputs="x[2,3,D] past_k[b,4,past,4] past_v[b,4,past,4]",
        outputs="y, kc, v",
        extra={key: np.asarray(value) for key, value in extra.items()},
    )
    (block,) = hold(proto, 1)
    assert block.keys.rotated_last
    assert block.keys.rotary.source is block.keys.cache.present
    assert block.keys.rotary.positions.name == "r"


PLACE = "k = Transpose<perm=[0,2,3,1]>(kn) s0 = MatMul(q, k) s = Mul(s0, half) "
EACH = "k1 = Reshape(k0, heads) "
SIZE = "k2 = Mul(k1, k1) k3 = ReduceMean<keepdims=1>(k2, last) k4 = Add(k3, eps) k5 = Sqrt(k4) "
DEVIATION = "m = ReduceMean<keepdims=1>(k0, last) k1 = Sub(k0, m) "
NORMS = {  # of keys k0 [B, S, 16], as kn [B, S, 4, 4]; whether over all heads, and centred
    "one gain": (EACH + "kn = LayerNormalization<axis=-1>(k1, gain, shift) ", False, True),
    "no gain": (EACH + SIZE + "kn = Div(k1, k5) ", False, False),
    "a gain for each head": (EACH + SIZE + "n = Div(k1, k5) kn = Mul(gains, n) ", False, False),
    "gain and shift for each head": (
        EACH + "n = LayerNormalization<axis=-1>(k1, gain) n1 = Mul(n, gains) kn = Add(n1, gains) ",
        False,
        True,
    ),
    "deviations from the mean": (
        f"{DEVIATION}{SIZE}n = Div(k1, k5) n1 = Mul(n, g) kn = Reshape(n1, heads) ",
        True,
        True,
    ),
    "an operator for each head": (
        EACH + "h0, h1, h2, h3 = Split<axis=2, num_outputs=4>(k1) "
        "n0 = LayerNormalization<axis=-1>(h0, gain) n1 = LayerNormalization<axis=-1>(h1, twice) "
        "n2 = LayerNormalization<axis=-1>(h2, gain) n3 = LayerNormalization<axis=-1>(h3, gain) "
        "kn = Concat<axis=2>(n0, n1, n2, n3) ",
        False,
        True,
    ),
    "all heads": (
        "n = LayerNormalization<axis=-1>(k0, g, beta) kn = Reshape(n, heads) ",
        True,
        True,
    ),
}
OTHER_NORMS = {
    "more than a head": (
        (
            "k1 = Reshape(k0, twos) n = LayerNormalization<axis=-1>(k1, eights) "
            "kn = Reshape(n, heads) "
        ),
        "over other channels than those of one head or of all",
    ),
    "two kinds of norm": (
        EACH + "h0, h1 = Split<axis=2, num_outputs=2>(k1) "
        "n0 = LayerNormalization<axis=-1>(h0, gain) "
        "n1 = LayerNormalization<axis=-1, epsilon=0.1>(h1, gain) kn = Concat<axis=2>(n0, n1) ",
        "in another way than by one RMSNorm or LayerNorm",
    ),
}


def normed(body: str) -> onnx.ModelProto:
    random = np.random.default_rng(7)
    extra = {
        "flat3": EXTRA["flat3"],
        "gain": random.standard_normal(4).astype(np.float32),
        "twice": random.standard_normal(4).astype(np.float32),
        "shift": random.standard_normal(4).astype(np.float32),
        "gains": random.standard_normal((4, 4)).astype(np.float32),
        "eights": random.standard_normal(8).astype(np.float32),
        "twos": np.array([0, 0, 2, 8]),
    }
    queries = "q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1) "
    values = "v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1) "
    body = PROJECT + queries + values + body + PLACE + WEIGH + MERGE
    return toys.model(body, inputs="x[2,3,D]", extra=extra)


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_of_keys_is_computed_again(name: str) -> None:
    body, whole, centered = NORMS[name]
    (block,) = hold(normed(body), 1)
    norm = block.keys.norm
    assert isinstance(norm, HeadNorm)
    assert (norm.whole, norm.centered) == (whole, centered)
    assert block.query.norm is None


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_other_norms_of_keys_are_told(name: str) -> None:
    body, reason = OTHER_NORMS[name]
    _, (block,) = views(normed(body))
    assert isinstance(block, Attention)
    assert isinstance(block.keys.norm, str)
    assert reason in block.keys.norm


TURN = (
    "kh = Reshape(k0, heads) k1 = Transpose<perm=[0,2,1,3]>(kh) n = Shape<start=2, end=3>(k1) "
    "n0 = Squeeze(n) r = Range(zero, n0, unit) r1 = Cast<to=1>(r) r2 = Unsqueeze(r1, last) "
    "an = Mul(r2, frequency) {angles} ka, kb = Split<axis=3, num_outputs=2>(k1) kn = Neg(kb) "
    "kr = Concat<axis=3>(kn, ka) m1 = Mul(k1, co) m2 = Mul(kr, si) kt = Add(m1, m2) "
)
COMPUTED = "co = Cos(an) si = Sin(an) "
BEHIND = (
    "t2 = Mul(kt, kt) t3 = ReduceMean<keepdims=1>(t2, last) t4 = Add(t3, eps) t5 = Sqrt(t4) "
    "t6 = Div(kt, t5) kz = Mul(gain, t6) "
)


def turned(angles: str, norm: str = BEHIND) -> onnx.ModelProto:
    positions = np.arange(8, dtype=np.float32)[:, None] * np.float32([1, 0.3, 1, 0.3])
    extra = {
        "flat3": EXTRA["flat3"],
        "zero": np.array(0),
        "unit": np.array(1),
        "frequency": np.array([1, 0.3, 1, 0.3], np.float32),
        "cosines": np.cos(positions),
        "sines": np.sin(positions),
        "gain": np.array([0.5, 1.5, -2, 3], np.float32),
    }
    rest = (
        "q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1) v1 = Reshape(v0, heads) "
        "v = Transpose<perm=[0,2,1,3]>(v1) k = Transpose<perm=[0,1,3,2]>(kz) s = MatMul(q, k) "
    )
    body = PROJECT + TURN.format(angles=angles) + norm + rest + WEIGH + MERGE
    return toys.model(body, inputs="x[2,3,D]", extra=extra)


@pytest.mark.parametrize(
    "angles",
    [COMPUTED, "co = Gather(cosines, r) si = Gather(sines, r) "],
    ids=["computed", "table"],
)
def test_a_norm_behind_a_rotation_is_computed_again(angles: str) -> None:
    (block,) = hold(turned(angles), 1)
    assert isinstance(block.keys.norm, HeadNorm)
    assert block.keys.norm.turned


@pytest.mark.parametrize(
    ("angles", "norm", "reason"),
    [
        (COMPUTED, "kz = LayerNormalization<axis=-1>(kt, gain) ", "by more than their size"),
        ("ca = Cos(an) co = Mul(ca, two) sa = Sin(an) si = Mul(sa, two) ", BEHIND, "keeps"),
        ("co = Gather(cosines, r) sa = Gather(sines, r) si = Mul(sa, two) ", BEHIND, "keeps"),
        ("co = Cos(an) aa = Mul(an, half) si = Sin(aa) ", BEHIND, "keeps their size"),
    ],
)
def test_a_norm_that_a_rotation_does_not_pass_is_told(angles: str, norm: str, reason: str) -> None:
    _, (block,) = views(turned(angles, norm))
    assert isinstance(block, Attention)
    assert isinstance(block.keys.norm, str)
    assert reason in block.keys.norm


REFUSED = {
    "sinks": (
        (
            "s0 = MatMul(q, k) s = Concat<axis=3>(s0, sink3) a0 = Softmax<axis=-1>(s) "
            "a = Slice(a0, begin, one_less, last) ctx = MatMul(a, v) "
        ),
        "sinks of attention",
    ),
    "two products": (
        "s0 = MatMul(q, k) qq = Mul(q, q) s1 = MatMul(qq, k) s = Add(s0, s1) " + WEIGH,
        "several products",
    ),
    "squared scores": ("s0 = MatMul(q, k) s = Mul(s0, s0) " + WEIGH, "changes the scores"),
    "weighted weights": (
        "s = MatMul(q, k) a0 = Softmax<axis=-1>(s) a = Mul(a0, alibi) ctx = MatMul(a, v) ",
        "does more than multiply",
    ),
    "keys that are squared": (
        "kk = Mul(k, k) s = MatMul(q, kk) " + WEIGH,
        "its keys cannot be traced: Mul",
    ),
}


def test_a_cache_of_keys_and_values_in_one_tensor_is_refused_with_advice() -> None:
    body = "y, pk = com.microsoft.Attention<num_heads=4>(x, w_packed, c_packed, , past)"
    proto = toys.model(body, inputs="x[2,3,D] past[2,b,4,before,4]", outputs="y, pk")
    _, (block,) = views(proto)
    assert isinstance(block, OpaqueAttention)
    assert "export the decoder with" in block.reason


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_is_not_understood_is_named_with_the_reason(name: str) -> None:
    body, reason = REFUSED[name]
    body = (PROJECT + ARRANGE + body + MERGE).replace("sink3", "sink").replace("alibi", "alibi3")
    extra = {**EXTRA, "sink": EXTRA["sink"][:, :, :3], "alibi3": EXTRA["alibi"][..., :3]}
    extra = {key: np.asarray(value) for key, value in extra.items()}
    _, found = views(toys.model(body, inputs="x[2,3,D]", extra=extra))
    (block,) = found
    assert isinstance(block, OpaqueAttention)
    assert reason in block.reason


def test_a_softmax_that_weighs_no_values_is_no_attention(export: Export) -> None:
    _, found = views(toys.model("h = MatMul(x, w_square) y = Softmax<axis=-1>(h)"))
    assert found == []
    _, found = views(export("qwen3_moe", "optimum") / "model.onnx")
    assert len(found) == 2  # and not the two routers


def test_attention_with_sinks_is_refused_in_a_real_model(export: Export) -> None:
    _, found = views(export("gpt_oss", "optimum") / "model.onnx")
    assert [type(one) for one in found] == [OpaqueAttention] * 2
    assert all("sinks" in one.reason for one in found)
