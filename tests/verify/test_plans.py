"""Valid inputs for whatever a model asks for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.verify.cases import Case
from onnx_tricks.verify.plans import plans
from tests.verify.conftest import parse


def nothing_given(_name: str, _batch: int) -> None:
    return None


def all_plans(text: str) -> list[tuple[Case, ...]]:
    return list(plans(read_interface(ir.from_proto(parse(text))), nothing_given))


def test_prompts_differ_in_length_and_one_batch_is_padded_on_the_left(demo) -> None:
    interface = read_interface(load_model(demo["fp32"]).model)
    cases = next(plans(interface, nothing_given))
    assert [(case.batch, case.steps[0].new) for case in cases] == [(1, 7), (2, 33), (2, 1)]
    (padded,) = [case for case in cases if not case.steps[0].valid.all()]
    mask, positions = (padded.steps[0].feeds[n] for n in ("attention_mask", "position_ids"))
    assert mask[1].tolist() == [0] * 22 + [1] * 11
    assert positions[1, 22:].tolist() == list(range(11))
    following = padded.steps[1].feeds
    assert following["attention_mask"].shape == (2, 34)
    assert following["position_ids"].tolist() == [[33], [11]]


def test_caches_start_empty_and_are_continued_by_the_presents(demo) -> None:
    interface = read_interface(load_model(demo["fp32"]).model)
    case = next(plans(interface, nothing_given))[1]
    assert case.caches["past_key_values.3.value"].shape == (2, 6, 0, 32)
    assert interface.presents["past_key_values.3.value"] == "present.3.value"
    assert len(interface.presents) == 8


def test_ids_stay_within_the_table_that_they_index() -> None:
    text = """
    g (int64[b,s] input_ids, int64[b,s] token_type_ids) => (float[b,s,4] y)
    <float[11,4] words, float[2,4] kinds>
    { r = Unsqueeze(input_ids, a) q = Gather(words, r) k = Gather(kinds, token_type_ids)
      p = Squeeze(q, a) y = Add(p, k) }"""
    for cases in all_plans(text):
        for case in cases:
            feeds = case.steps[0].feeds
            assert 0 <= feeds["input_ids"].min() <= feeds["input_ids"].max() < 11
            assert 0 <= feeds["token_type_ids"].min() <= feeds["token_type_ids"].max() < 2


def test_fixed_sizes_are_kept() -> None:
    text = (
        "g (int64[1,5] input_ids) => (float[1,5,4] y) <float[9,4] w> { y = Gather(w, input_ids) }"
    )
    for (case,) in all_plans(text):
        assert case.steps[0].feeds["input_ids"].shape == (1, 5)


def test_left_padding_is_left_out_where_attention_does_not_know_it() -> None:
    text = """
    g (int64[b,s] input_ids, int64[b,t] attention_mask, float[b,2,p,4] past_key_values.0.key,
       float[b,2,p,4] past_key_values.0.value)
      => (float[b,s,8] y, float[b,2,t,4] present.0.key, float[b,2,t,4] present.0.value)
    { y, present.0.key, present.0.value = com.microsoft.GroupQueryAttention
      <num_heads = 2, kv_num_heads = 2>
      (q, k, v, past_key_values.0.key, past_key_values.0.value, l, t) }"""
    text = text.replace("past_key_values.0.", "past_").replace("present.0.", "present_")
    cases = all_plans(text)[0]
    assert max(case.batch for case in cases) == 2
    assert all(step.valid.all() for case in cases for step in case.steps)


def test_an_image_has_the_size_that_its_position_table_asks_for() -> None:
    text = """
    g (float[b,3,h,w] pixel_values) => (float[b,8,i,j] y)
    <float[8,3,4,4] patch, float[1,50,8] positions>
    { y = Conv<strides = [4, 4]>(pixel_values, patch) }"""
    first, *others = all_plans(text)
    assert first[0].steps[0].feeds["pixel_values"].shape == (2, 3, 28, 28)
    assert others


def test_axes_with_the_name_of_one_of_the_ids_are_as_long() -> None:
    text = """
    g (int64[b,s] input_ids, int64[b,s,4] bbox, float[b,v,6] features, int64[b,v] feature_mask)
      => (float[b,s,4] y) <float[11,4] words, float[50,4] corners>
    { p = Gather(words, input_ids) left = Gather<axis = 2>(bbox, zero)
      q = Gather(corners, left) y = Add(p, q) }"""
    for cases in all_plans(text):
        for case in cases:
            feeds = case.steps[0].feeds
            length = feeds["input_ids"].shape[1]
            assert feeds["bbox"].shape == (case.batch, length, 4)
            assert 0 <= feeds["bbox"].min() <= feeds["bbox"].max() < 50
            assert (np.diff(feeds["bbox"]) >= 0).all()  # far corners come after near ones
            assert feeds["feature_mask"].shape == feeds["features"].shape[:2]


def test_ids_that_a_model_looks_for_are_among_the_tokens() -> None:
    text = """
    g (int64[b,s] input_ids) => (float[b,s,4] y) <float[9,4] w, int64 image = {9}>
    { m = Equal(input_ids, image) k = Where(m, image, input_ids) y = Gather(w, k) }"""
    marked, plain, *_ = all_plans(text)
    assert all((case.steps[0].feeds["input_ids"] == 9).any() for case in marked[:2])
    assert all((case.steps[0].feeds["input_ids"] < 9).all() for case in plain)


def test_rows_of_ids_may_be_a_multiple_of_the_rows_of_all_else() -> None:
    text = """
    g (int64[batch_x_books,s] input_ids, float[batch,n,8] states) => (float[b,s,4] y)
    <float[9,4] w> { y = Gather(w, input_ids) }"""
    rows = set()
    for case, *_ in all_plans(text):
        feeds = case.steps[0].feeds
        rows.add(feeds["input_ids"].shape[0] // feeds["states"].shape[0])
    assert {1, 2, 4} <= rows


def test_an_image_keeps_the_sides_that_the_model_fixes() -> None:
    text = """
    g (float[b,c,24,w] pixel_values) => (float[b,8,i,j] y) <float[8,3,4,4] patch>
    { y = Conv<strides = [4, 4]>(pixel_values, patch) }"""
    for (case,) in all_plans(text):
        assert case.steps[0].feeds["pixel_values"].shape[:3] == (case.batch, 3, 24)


def test_a_single_floating_number_is_one_and_no_series() -> None:
    text = """
    g (float[b,c,n] features, float[1] penalty, float scale) => (float[b,c,n] y)
    { s = Mul(features, penalty) y = Mul(s, scale) }"""
    for (case,) in all_plans(text):
        feeds = case.steps[0].feeds
        assert feeds["penalty"].tolist() == [1.0]
        assert feeds["scale"] == 1
        assert feeds["features"].size < 10_000  # and not sound along both axes


def test_numbers_differ_from_seed_to_seed(demo) -> None:
    interface = read_interface(load_model(demo["fp32"]).model)
    case = next(plans(interface, nothing_given))[0]
    ids = [one.steps[0].feeds["input_ids"] for one in (case, case.again(1), case.again(2))]
    assert ids[0].shape == ids[1].shape == ids[2].shape
    assert len({one.tobytes() for one in ids}) == 3


def test_a_merged_decoder_takes_its_first_branch_first() -> None:
    text = """
    g (int64[b,s] input_ids, bool[1] use_cache_branch, float[b,2,p,4] past_key)
      => (float[b,s,4] y, float[b,2,p,4] present_key)
    <float[9,4] w>
    { y = Gather(w, input_ids) present_key = Identity(past_key) }"""
    case = all_plans(text)[0][0]
    branches = [bool(step.feeds["use_cache_branch"][0]) for step in case.steps]
    assert branches == [False, True, True, True]


def crossing(new: str) -> str:
    """A decoder that is fed the keys of an encoder, which nothing continues."""
    return f"""
    g (int64[b,{new}] input_ids, int64[b,e] encoder_attention_mask, float[b,2,p,4] past_key_self_0,
       float[b,2,e,4] past_key_cross_0) => (float[b,s,4] y, float[b,2,t,4] present_key_self_0)
    <float[9,4] w>
    {{ y = Gather(w, input_ids) present_key_self_0 = Identity(past_key_self_0) }}"""


def test_caches_that_nothing_continues_are_as_long_as_their_mask_and_hold_no_own_tokens() -> None:
    case = all_plans(crossing("s"))[0][1]
    assert [step.new for step in case.steps] == [33, 1, 1]
    assert case.caches["past_key_self_0"].shape == (2, 2, 0, 4)
    length = case.caches["past_key_cross_0"].shape[2]
    assert length > 0
    assert {step.feeds["encoder_attention_mask"].shape for step in case.steps} == {(2, length)}


def test_a_decoder_of_one_token_at_a_time_decodes_step_by_step() -> None:
    cases = all_plans(crossing("1"))[0]
    assert [[step.new for step in case.steps] for case in cases] == [[1] * 4, [1] * 3, [1] * 2]


def test_equal_cases_hold_equal_numbers(demo) -> None:
    interface = read_interface(load_model(demo["fp32"]).model)
    first, second = (next(plans(interface, nothing_given)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for name, array in a.steps[0].feeds.items():
            np.testing.assert_array_equal(array, b.steps[0].feeds[name])
